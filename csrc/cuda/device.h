// What the choice of a kernel knows of the device that it is for. No CUDA or torch header here.
//
// A kernel's files are named by the generation of GPUs that it is for: the first compute capability
// that has its instructions (sm80_*, sm90_*). setup.py compiles each for the architectures of its
// own generation.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace bigkernel {

struct DeviceTraits {
  int32_t capability;        // 10 * major + minor
  int32_t shared_per_block;  // bytes that a block may ask for
  int32_t multiprocessors;
  int32_t l2_bytes;
};

constexpr int32_t kSm80 = 80;

// Blocks of so much shared memory that a multiprocessor has room for at a time. It has 1 KB more
// than one block may ask for, and a block takes 1 KB more than it asks for.
constexpr int32_t kSharedOfBlock = 1024;
inline int64_t blocks_by_shared(const DeviceTraits& device, size_t shared) {
  return (int64_t{device.shared_per_block} + kSharedOfBlock) / (int64_t(shared) + kSharedOfBlock);
}

// The capability that this device code is compiled for, 0 in host code. For what the compiler alone
// reads, such as launch bounds: what host code reads too must not depend on it.
#ifdef __CUDA_ARCH__
constexpr int32_t kCompiledFor = __CUDA_ARCH__ / 10;
#else
constexpr int32_t kCompiledFor = 0;
#endif

// Throws std::runtime_error unless the device runs kernels of this generation, and gives a block
// so many bytes of shared memory.
inline void check_device(const char* op, const char* kernel, const DeviceTraits& device,
                         int32_t generation, size_t shared = 0) {
  const auto version = [](int32_t capability) {
    return std::to_string(capability / 10) + "." + std::to_string(capability % 10);
  };
  const auto refuse = [&](const std::string& why) {
    throw std::runtime_error(std::string("bigkernel.") + op + ": " + kernel + " " + why +
                             ". bigkernel.use_backend('torch') computes it in PyTorch.");
  };
  if (device.capability < generation)
    refuse("is for GPUs of compute capability " + version(generation) +
           " or later, and this one has " + version(device.capability));
  if (shared > size_t(device.shared_per_block))
    refuse("takes " + std::to_string(shared) + " bytes of shared memory for a block, and this GPU" +
           " (compute capability " + version(device.capability) + ") has " +
           std::to_string(device.shared_per_block));
}

}  // namespace bigkernel
