// Sums between hosts.
#pragma once

#include <ATen/ATen.h>

#include <iterator>
#include <sstream>
#include <thread>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include "../cpu/peers.h"

namespace deepfast::bindings {

using at::Tensor;
using cpu::Missing;
using cpu::Peers;

// The other hosts, as each host's first rank reaches them: through torch.distributed, once an operation.
class Hosts {
 public:
  // leaders: one rank a host. names[host]: what the whole group calls the host's ranks, the leader first.
  Hosts(c10::intrusive_ptr<c10d::Backend> leaders, c10::intrusive_ptr<c10d::Store> store, int host,
        std::vector<std::vector<int>> names)
      : leaders_(std::move(leaders)), store_(std::move(store)), host_(host), names_(std::move(names)) {}

  bool leads() const { return leaders_.defined(); }

  // Adds `t` over the hosts, in place. While it waits it keeps its number of this operation in the store, and looks
  // there for what the other hosts have to say.
  void add(Peers& peers, Tensor t) {
    ++operation_;
    peers.wait_elsewhere(true);
    std::vector<Tensor> tensors = {std::move(t)};
    std::string error;
    try {
      const auto work = leaders_->allreduce(tensors);
      const auto start = Clock::now();
      auto look = start + kLook;
      while (!work->isCompleted()) {
        std::this_thread::sleep_for(kNap);
        if (Clock::now() < look) continue;
        look = Clock::now() + kLook;
        say("at", std::to_string(operation_));
        peers.look_up();
        if (const auto missed = failed(); !missed.empty()) peers.fail("as another host has found", missed);
        if (Clock::now() - start > peers.timeout() + kGrace) peers.fail("silent at the timeout", absent());
      }
      work->wait();
    } catch (const Missing&) {
      throw;
    } catch (const c10::Error& broken) {  // a connection that ended: whose it was, the store knows
      error = broken.what_without_backtrace();
    } catch (const std::runtime_error& broken) {
      error = broken.what();
    }
    if (error.empty()) return peers.wait_elsewhere(false);
    say("at", std::to_string(operation_));
    for (const auto until = Clock::now() + kGrace; Clock::now() < until; std::this_thread::sleep_for(kLook)) {
      if (const auto missed = failed(); !missed.empty()) peers.fail("as another host has found", missed);
      if (absent().empty()) break;
    }
    const auto missed = absent();
    peers.fail(error.substr(0, error.find('\n')), missed.empty() ? names_[host_] : missed);
  }

  // So that the other hosts learn whom this one has missed.
  void report(const std::vector<int>& missed) {
    std::ostringstream text;
    for (int rank : missed) text << rank << ' ';
    say("missed", text.str());
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr auto kNap = std::chrono::microseconds(50);
  static constexpr auto kLook = std::chrono::milliseconds(100);
  static constexpr auto kGrace = std::chrono::milliseconds(1500);  // for other hosts to say whom they have missed

  static std::string key(const char* what, int host) { return std::string(what) + "/" + std::to_string(host); }

  void say(const char* what, const std::string& text) {
    try {
      store_->set(key(what, host_), std::vector<uint8_t>(text.begin(), text.end()));
    } catch (const std::exception&) {  // the store may be gone with the rank that kept it
    }
  }

  std::string said(const char* what, int host) {
    try {
      if (!store_->check({key(what, host)})) return "";
      const auto bytes = store_->get(key(what, host));
      return {bytes.begin(), bytes.end()};
    } catch (const std::exception&) {
      return "";
    }
  }

  std::vector<int> failed() {
    for (size_t host = 0; host < names_.size(); ++host) {
      std::istringstream text(static_cast<int>(host) == host_ ? "" : said("missed", host));
      std::vector<int> ranks{std::istream_iterator<int>(text), {}};
      if (!ranks.empty()) return ranks;
    }
    return {};
  }

  // The leaders of hosts that have not come to this operation.
  std::vector<int> absent() {
    std::vector<int> ranks;
    for (size_t host = 0; host < names_.size(); ++host) {
      if (static_cast<int>(host) != host_ && said("at", host) != std::to_string(operation_)) {
        ranks.push_back(names_[host][0]);
      }
    }
    return ranks;
  }

  c10::intrusive_ptr<c10d::Backend> leaders_;
  c10::intrusive_ptr<c10d::Store> store_;
  const int host_;
  const std::vector<std::vector<int>> names_;
  uint64_t operation_ = 0;
};

}  // namespace deepfast::bindings
