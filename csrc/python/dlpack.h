// As much of DLPack's C interface as is used here: how torch.Tensor shows its memory to C code that
// holds the Python object. The layout of these structs is DLPack's, version 1; torch's own header
// of it cannot be had together with the stable ABI.
#pragma once
#include <cstdint>

namespace bigkernel::dlpack {

constexpr int32_t kCpu = 1;                                           // Device::type
constexpr uint8_t kFloat = 2, kBfloat = 4;                            // DataType::code
constexpr const char* kTableAttribute = "__dlpack_c_exchange_api__";  // a capsule, of the type
constexpr const char* kTableName = "dlpack_exchange_api";

struct Device {
  int32_t type, index;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct View {  // DLTensor; shape and strides belong to the tensor
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct Table {  // DLPackExchangeAPI
  uint32_t major, minor;
  Table* older;
  void *allocate, *managed_from_object, *managed_to_object;
  int (*view_of_object)(void* object, View* view);  // not 0, and a Python error, where it has none
  void* current_stream;
};

}  // namespace bigkernel::dlpack
