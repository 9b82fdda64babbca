// Tables that do not fit a launch's parameters, sent piece by piece in those of others.
#include "table.cuh"

namespace deepfast::cuda {
namespace {

struct alignas(16) Piece {
  uint64_t words[kTableBytes / 8];
};

__global__ void copy_kernel(const __grid_constant__ Piece piece, uint64_t* to, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = piece.words[i];
}

}  // namespace

// Only pieces that differ from what is there.
void send(const char* bytes, int64_t size, char* table, char* sent, Stream stream) {
  for (int64_t at = 0; at < size; at += kTableBytes) {
    const int64_t n = std::min<int64_t>(kTableBytes, size - at);
    if (sent && std::memcmp(sent + at, bytes + at, n) == 0) continue;
    Piece piece;
    std::memcpy(piece.words, bytes + at, n);
    launch(copy_kernel, 1, kThreads, stream, piece, reinterpret_cast<uint64_t*>(table + at),
           static_cast<int>(n / sizeof(uint64_t)));
    if (sent) std::memcpy(sent + at, bytes + at, n);
  }
}

int64_t table_bytes(const Job& job) { return bytes_of(job) <= kTableBytes ? 0 : bytes_of(job); }

bool is_capturing(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status), "the stream does not answer");
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace deepfast::cuda
