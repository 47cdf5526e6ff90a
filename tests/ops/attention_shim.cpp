// What csrc/attention/cuda.cpp does between its checks and its return, for attention_ptx.py.
#include <algorithm>
#include <exception>
#include <string>

#include "attention/cuda.h"
#include "attention/cuda_order.h"

using namespace bigkernel;

namespace {
template <class F>
const char* message_of(F&& f) {
  static std::string message;
  message.clear();
  try {
    f();
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}
}  // namespace

// The place of each of a launch's blocks, for tools/cuda_schedule.py.
extern "C" void attention_places(uint32_t blocks, uint32_t heads, uint32_t tiles, uint32_t together,
                                 BlockPlace* places) {
  for (uint32_t block = 0; block < blocks; ++block)
    places[block] = block_place(block, heads, tiles, together);
}
extern "C" void attention_set_dropout(AttentionCudaArgs* args, double p) { set_dropout(*args, p); }

// These return what was thrown, or "".
extern "C" const char* attention_fwd_plan(const AttentionCudaArgs* args, const DeviceTraits* device,
                                          AttentionLaunch* launch) {
  return message_of([&] { *launch = plan_attention_fwd(*args, *device); });
}
extern "C" const char* attention_fwd_run(const AttentionCudaArgs* args, int device) {
  return message_of([&] { launch_attention_fwd(*args, device, nullptr); });
}
// Returns the floats of one split.
extern "C" int64_t attention_split_fwd(AttentionCudaArgs* args, const DeviceTraits* device) {
  split_attention_fwd(*args, *device);
  return args->splits > 0 ? attention_few_part(*args) : 0;
}
extern "C" const char* attention_few_plan(const AttentionCudaArgs* args, const DeviceTraits* device,
                                          AttentionLaunch* launches, int64_t* count) {
  return message_of([&] {
    const std::vector<AttentionLaunch> plan = plan_attention_few(*args, *device);
    *count = int64_t(plan.size());
    std::copy(plan.begin(), plan.end(), launches);
  });
}
extern "C" const char* attention_few_run(const AttentionCudaArgs* args, int device) {
  return message_of([&] { launch_attention_few(*args, device, nullptr); });
}
extern "C" const char* attention_bwd_plan(const AttentionCudaArgs* args, const DeviceTraits* device,
                                          AttentionLaunch* launches, int64_t* count) {
  return message_of([&] {
    const std::vector<AttentionLaunch> plan = plan_attention_bwd(*args, *device);
    *count = int64_t(plan.size());
    std::copy(plan.begin(), plan.end(), launches);
  });
}
// Returns the floats of one split.
extern "C" int64_t attention_split_bwd(AttentionCudaArgs* args, const DeviceTraits* device) {
  split_attention_bwd(*args, *device);
  return attention_bwd_part(*args);
}
extern "C" const char* attention_bwd_run(const AttentionCudaArgs* args, int device) {
  return message_of([&] { launch_attention_bwd(*args, device, nullptr); });
}
