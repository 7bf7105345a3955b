#pragma once
#include "cuda_cpu.h"
