// The oldest torch whose stable interface is used: a file that includes this first takes nothing else of torch.
#pragma once

#define TORCH_TARGET_VERSION 0x020b000000000000  // 2.11
