// What csrc/augment/cuda.cpp does between its checks and its return, for augment_ptx.py.
#include <exception>
#include <string>

#include "augment/cuda_plan.h"
#include "cuda/launch.h"

using namespace bigkernel;

// sizes: bytes of the tables and of the scratch memory, launches, blocks an image.
extern "C" const char* augment_plan(const AugmentInput* input, const DeviceTraits* device,
                                    int64_t* sizes) {
  static std::string message;
  message.clear();
  try {
    const AugmentLaunch launch = plan_augment(*input, *device);
    sizes[0] = launch.table_bytes;
    sizes[1] = launch.scratch_bytes;
    sizes[2] = 1 + int64_t(launch.later.size());
    sizes[3] = launch.blocks;
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

// tables: host memory that device 0 sees at device_tables. Returns what was thrown, or "".
extern "C" const char* augment_run(const AugmentInput* input, void* tables, void* device_tables,
                                   void* scratch) {
  static std::string message;
  message.clear();
  try {
    const AugmentLaunch launch = plan_augment(*input, device_traits(0));
    write_augment_tables(*input, launch, scratch, tables);
    launch_augment(*input, launch, device_tables, scratch, 0, nullptr);
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}
