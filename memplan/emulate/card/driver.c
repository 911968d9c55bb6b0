/* libcuda of the card that is not there: what PyTorch's allocator (expandable segments), Triton and memplan ask.
 * Signatures: NVIDIA's cuda.h, 12.8 and 13.0. */
#define _GNU_SOURCE
#include "card.h"

#include <cuda.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int nothing(void) { return 0; }

CUresult cuGetErrorString(CUresult e, const char **text) {
    *text = e == CUDA_SUCCESS ? "no error" : e == CUDA_ERROR_OUT_OF_MEMORY ? "out of memory" : "an error";
    return CUDA_SUCCESS;
}
CUresult cuInit(unsigned flags) { (void)flags; return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = RELEASE; return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { *count = card()->visible; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; return CUDA_SUCCESS; }
CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
    (void)device;
    snprintf(name, length, "%s", card()->name);
    return CUDA_SUCCESS;
}
CUresult cuDeviceTotalMem(size_t *total, CUdevice device) { (void)device; *total = card()->total; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    (void)device;
    *value = card_attribute(attribute);
    return CUDA_SUCCESS;
}
CUresult cuMemGetInfo(size_t *free_bytes, size_t *total) {
    *total = card()->total;
    *free_bytes = *total - card_used();
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)&nothing; return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = card_current(); return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { (void)device; return cuCtxGetCurrent(context); }
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    (void)device;
    *flags = 0, *active = 1;
    return CUDA_SUCCESS;
}

/* Expandable segments: an address range is reserved, pages of the card are made and mapped into it. */

struct pages { size_t bytes; int card; };

CUresult cuMemGetAllocationGranularity(size_t *bytes, const CUmemAllocationProp *of, CUmemAllocationGranularity_flags f) {
    (void)of, (void)f;
    *bytes = 2 << 20;
    return CUDA_SUCCESS;
}
CUresult cuMemAddressReserve(CUdeviceptr *at, size_t bytes, size_t alignment, CUdeviceptr hint, unsigned long long f) {
    (void)alignment, (void)hint, (void)f;
    *at = (CUdeviceptr)card_addresses(bytes);
    return *at ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
CUresult cuMemAddressFree(CUdeviceptr at, size_t bytes) {
    card_addresses_back((char *)at, bytes);
    return CUDA_SUCCESS;
}
CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t bytes, const CUmemAllocationProp *of,
                     unsigned long long f) {
    (void)f;
    int which = of->location.id;
    if (card_take(bytes, which)) return CUDA_ERROR_OUT_OF_MEMORY;
    struct pages *pages = malloc(sizeof *pages);
    *pages = (struct pages){bytes, which};
    *handle = (CUmemGenericAllocationHandle)pages;
    return CUDA_SUCCESS;
}
CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
    struct pages *pages = (struct pages *)handle;
    card_give(pages->bytes, pages->card);
    free(pages);
    return CUDA_SUCCESS;
}
CUresult cuMemMap(CUdeviceptr at, size_t bytes, size_t offset, CUmemGenericAllocationHandle handle,
                  unsigned long long f) {
    (void)offset, (void)handle, (void)f;
    return card_map((char *)at, bytes, 1) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
CUresult cuMemUnmap(CUdeviceptr at, size_t bytes) {
    return card_map((char *)at, bytes, 0) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
CUresult cuMemSetAccess(CUdeviceptr at, size_t bytes, const CUmemAccessDesc *how, size_t count) {
    (void)at, (void)bytes, (void)how, (void)count;
    return CUDA_SUCCESS;
}

/* Triton: modules load, kernels are found and launched, and do nothing. */

static CUresult some(void **handle) { *handle = (void *)&nothing; return CUDA_SUCCESS; }

CUresult cuModuleLoadData(CUmodule *module, const void *image) { (void)image; return some((void **)module); }
CUresult cuModuleGetFunction(CUfunction *kernel, CUmodule module, const char *name) {
    (void)module, (void)name;
    return some((void **)kernel);
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction kernel) {
    (void)kernel;
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction kernel, const CUlaunchConfig *config) {
    (void)kernel, (void)config;
    *clusters = card()->multiprocessors;
    return CUDA_SUCCESS;
}
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { (void)limit; *value = 1 << 20; return CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr at) {
    if (!card_has((void *)at)) return CUDA_ERROR_INVALID_VALUE;
    if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr *)value = at;
    else *(unsigned *)value = attribute == CU_POINTER_ATTRIBUTE_MEMORY_TYPE ? CU_MEMORYTYPE_DEVICE : 0;
    return CUDA_SUCCESS;
}
CUresult cuGetProcAddress(const char *name, void **function, int version, cuuint64_t flags,
                          CUdriverProcAddressQueryResult *found) {
    (void)version, (void)flags;
    char newer[128];
    *function = dlsym(RTLD_DEFAULT, name);
    for (int i = 2; !*function && i < 5; i++) { /* some are there under the name of their newest version alone */
        snprintf(newer, sizeof newer, "%s_v%d", name, i);
        *function = dlsym(RTLD_DEFAULT, newer);
    }
    if (!*function) *function = (void *)nothing;
    if (found) *found = CU_GET_PROC_ADDRESS_SUCCESS;
    return CUDA_SUCCESS;
}
