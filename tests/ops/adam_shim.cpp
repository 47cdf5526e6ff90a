// What csrc/adam/cuda.cpp does between its checks and its return, for adam_ptx.py.
#include <exception>
#include <string>
#include <vector>

#include "adam/cuda.h"

using namespace bigkernel;

extern "C" int64_t adam_partials(const AdamTensor* tensors, int64_t count) {
  return adam_partial_count({tensors, tensors + count});
}

// measure: 0 only the step, 1 norm and step, 2 only the norm. Returns what was thrown, or "".
extern "C" const char* adam_run(const AdamTensor* tensors, int64_t count,
                                const AdamDeviceGroup* groups, int64_t group_count,
                                const AdamDeviceCall* call, int measure, int device) {
  static std::string message;
  message.clear();
  try {
    const std::vector<AdamTensor> list(tensors, tensors + count);
    if (measure) launch_adam_norm(list, call->partials, device, nullptr);
    if (measure == 2)
      launch_adam_finish(*call, device, nullptr);
    else
      launch_adam_step(list, {groups, groups + group_count}, *call, device, nullptr);
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}
