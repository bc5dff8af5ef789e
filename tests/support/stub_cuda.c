// A CUDA driver for machines without one: it takes what Triton's launcher hands to libcuda.so.1, and
// keeps the last launches, parameter by parameter. tests/support/host_path.py builds and reads it.
#include <stdint.h>
#include <string.h>

#include "cuda.h"

#define MOST_PARAMS 96
#define MOST_BYTES 4096
#define MOST_LAUNCHES 64

typedef struct {
  int n_params;
  int sizes[MOST_PARAMS];
} Function;

typedef struct {
  uint64_t function, stream;
  uint32_t grid[3], threads, shared, attributes, n_bytes;
  uint8_t bytes[MOST_BYTES];
} Launch;

static Function functions[1024];
static Launch launches[MOST_LAUNCHES];
static int n_functions, n_launches, n_maps;
static uint64_t context = 1;

void stub_sizes(uint64_t function, int n, const int *sizes) {
  Function *f = (Function *)function;
  f->n_params = n;
  memcpy(f->sizes, sizes, n * sizeof(int));
}
int stub_launches(void) { return n_launches; }
int stub_maps(void) { return n_maps; }
void stub_clear(void) { n_launches = n_maps = 0; }
const Launch *stub_launch(int i) { return &launches[i % MOST_LAUNCHES]; }

CUresult cuGetErrorString(CUresult code, const char **text) {
  *text = "an error of the stub driver";
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *c) {
  *c = (CUcontext)&context;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext c) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int i) {
  *device = i;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice device) {
  *c = (CUcontext)&context;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute what, CUdevice device) {
  *value = 232448;  // bytes of shared memory of an H100; nothing else is asked
  return CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule *module, const void *data) {
  *module = (CUmodule)&context;
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)&functions[n_functions++];
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute what, CUfunction function) {
  *value = what == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute what, int value) {
  return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *config) {
  *n = 1;
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute what, CUdeviceptr pointer) {
  *(CUdeviceptr *)value = pointer;
  return CUDA_SUCCESS;
}

// The map holds what it was made from, so that two maps are equal if and only if they say the same.
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank,
                                void *address, const cuuint64_t *shape, const cuuint64_t *strides,
                                const cuuint32_t *box, const cuuint32_t *steps,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  uint64_t *to = (uint64_t *)map;
  memset(map, 0, sizeof(*map));
  to[0] = (uint64_t)address;
  to[1] = type | (uint64_t)rank << 8 | (uint64_t)swizzle << 16 | (uint64_t)fill << 24;
  for (cuuint32_t i = 0; i < rank; i++) {
    to[2 + i] = shape[i] << 32 | box[i];
    to[8 + i] = strides[i];
  }
  n_maps++;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **params,
                          void **extra) {
  Launch *launch = &launches[n_launches++ % MOST_LAUNCHES];
  const Function *f = (const Function *)function;
  launch->function = (uint64_t)function;
  launch->stream = (uint64_t)config->hStream;
  launch->grid[0] = config->gridDimX;
  launch->grid[1] = config->gridDimY;
  launch->grid[2] = config->gridDimZ;
  launch->threads = config->blockDimX;
  launch->shared = config->sharedMemBytes;
  launch->attributes = 0;
  for (unsigned i = 0; i < config->numAttrs; i++) launch->attributes |= 1u << config->attrs[i].id;
  launch->n_bytes = 0;
  for (int i = 0; i < f->n_params; i++) {
    memcpy(launch->bytes + launch->n_bytes, params[i], f->sizes[i]);
    launch->n_bytes += f->sizes[i];
  }
  return CUDA_SUCCESS;
}
