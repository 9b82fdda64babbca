// Tables that do not fit a launch's parameters, sent piece by piece in those of others.
#include "table.cuh"

namespace deepfast::cuda {
namespace {

// A kernel may take 32,764 bytes of parameters (sm_70 and later, CUDA 12.1 and later).
constexpr int64_t kWords = (32 * 1024 - 256) / sizeof(uint64_t);

template <int kMost>
struct alignas(16) Piece {
  uint64_t words[kMost];
};

template <int kMost>
__global__ void copy_kernel(const __grid_constant__ Piece<kMost> piece, uint64_t* to, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = piece.words[i];
}

template <int kMost>
void copy(const uint64_t* from, uint64_t* to, int64_t count, Stream stream) {
  Piece<kMost> piece;
  std::copy(from, from + count, piece.words);
  launch(copy_kernel<kMost>, 1, kThreads, stream, piece, to, static_cast<int>(count));
}

}  // namespace

// Only what differs from what is there: of each piece from the first such word to the last.
void send(const char* bytes, int64_t size, char* table, char* sent, Stream stream) {
  const auto* wanted = reinterpret_cast<const uint64_t*>(bytes);
  auto* there = reinterpret_cast<uint64_t*>(sent);
  for (int64_t piece = 0; piece < size / 8; piece += kWords) {
    int64_t begin = piece, end = std::min<int64_t>(piece + kWords, size / 8);
    const auto known = [&](int64_t i) { return there && there[i] == wanted[i] && wanted[i] != kUnknown; };
    while (begin < end && known(begin)) ++begin;
    while (begin < end && known(end - 1)) --end;
    if (begin == end) continue;
    const auto copy_words = end - begin <= kTableBytes / 8 ? copy<kTableBytes / 8> : copy<kWords>;
    copy_words(wanted + begin, reinterpret_cast<uint64_t*>(table) + begin, end - begin, stream);
    if (there) std::copy(wanted + begin, wanted + end, there + begin);
  }
}

bool is_capturing(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status), "the stream does not answer");
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace deepfast::cuda
