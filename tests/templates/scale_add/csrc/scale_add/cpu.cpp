// CPU binding of scale_add: checks, memory of the result, threads.
#include "scale_add/scale_add.h"

#include "common/box.h"
#include "cpu/parallel.h"
#include "cpu/row_view.h"

namespace bigkernel {
namespace {

Tensor scale_add_cpu(const Tensor& x, const Tensor& y, double scale) {
  constexpr const char* op = "scale_add";
  BK_CHECK(dtype_of(x, op, "x") == DType::kFloat32 && dtype_of(y, op, "y") == DType::kFloat32, op,
           "x and y must be float32");
  BK_CHECK(x.is_cpu() && y.is_cpu() && same_shape(x, y), op, "x and y must be alike, on the CPU");
  const Tensor first = torch::stable::contiguous(x), second = torch::stable::contiguous(y);
  Tensor out = Results::empty(first, shape_of_result(first), first.scalar_type());
  const ScaleAddArgs args{static_cast<const float*>(first.const_data_ptr()),
                          static_cast<const float*>(second.const_data_ptr()),
                          static_cast<float*>(out.mutable_data_ptr()), float(scale)};
  parallel_for(first.numel(), 16384,
               [&](int64_t begin, int64_t end) { BK_CALL(scale_add)(args, begin, end); });
  return out;
}

}  // namespace
}  // namespace bigkernel

BK_KERNELS(CPU, m) { m.impl("scale_add", BK_BOX(bigkernel::scale_add_cpu)); }
