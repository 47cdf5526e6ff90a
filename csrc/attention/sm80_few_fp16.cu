#include "attention/sm80_few.h"

namespace bigkernel {

AttentionLaunch attention_few_fp16(int32_t dim) { return choose_few<fp16, 64, 128, 256>(dim); }
AttentionLaunch attention_few_sum_fp16() { return few_sum<fp16>(); }

}  // namespace bigkernel
