#include "attention/sm80_few.h"

namespace bigkernel {

AttentionLaunch attention_few_bf16(int32_t dim) { return choose_few<bf16, 64, 128, 256>(dim); }
AttentionLaunch attention_few_sum_bf16() { return few_sum<bf16>(); }

}  // namespace bigkernel
