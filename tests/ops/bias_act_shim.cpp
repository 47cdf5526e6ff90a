// What csrc/bias_act/cuda.cpp does between its checks and its return, for bias_act_ptx.py.
#include <exception>
#include <string>

#include "bias_act/cuda.h"

using namespace bigkernel;

extern "C" int64_t bias_act_count_chunks(int64_t rows) { return bias_act_chunks(rows); }

// Returns what was thrown, or "".
extern "C" const char* bias_act_run(const BiasActCudaArgs* call, int device) {
  static std::string message;
  message.clear();
  try {
    launch_bias_act(*call, device, nullptr);
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}
