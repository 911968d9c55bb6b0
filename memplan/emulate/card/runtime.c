/* libcudart of the card that is not there. Signatures: NVIDIA's cuda_runtime_api.h, 12.8 and 13.0. */
#define _GNU_SOURCE
#include "card.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static __thread cudaError_t last;

static cudaError_t full(void) { return last = cudaErrorMemoryAllocation; }

/* Memory. The sizes of what was handed out stand in a table by address: 2 MiB slots, found by hashing. */

#define SLOTS (1 << 20)
static struct { char *at; size_t bytes; } taken[SLOTS];

static size_t slot(const char *at) {
    size_t i = ((size_t)at >> 21) * 0x9e3779b97f4a7c15u >> 44;
    while (taken[i].at && taken[i].at != at) i = (i + 1) % SLOTS;
    return i;
}

cudaError_t cudaMalloc(void **at, size_t bytes) {
    size_t whole = (bytes + 511) / 512 * 512;
    if (card_take(whole, card_current())) return full();
    char *address = card_addresses(whole);
    if (!address || card_map(address, whole, 1)) {
        card_give(whole, card_current());
        return full();
    }
    size_t i = slot(address);
    taken[i].at = address;
    taken[i].bytes = whole;
    *at = address;
    return cudaSuccess;
}

cudaError_t cudaFree(void *at) {
    if (!at) return cudaSuccess;
    size_t i = slot(at);
    if (!taken[i].at) return last = cudaErrorInvalidValue;
    card_map(at, taken[i].bytes, 0);
    card_give(taken[i].bytes, card_of(at));
    card_addresses_back(at, taken[i].bytes);
    taken[i].bytes = 0;
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    *total = card()->total;
    *free_bytes = *total - card_used();
    return cudaSuccess;
}

cudaError_t cudaMallocManaged(void **at, size_t bytes, unsigned flags) {
    (void)flags;
    return posix_memalign(at, 4096, bytes) ? full() : cudaSuccess;
}

/* Pinned memory of the host: programs ask whether it is. */

#define PINNED 65536
static struct { char *at; size_t bytes; } pinned[PINNED];
static int pinned_count;
static pthread_mutex_t pinning = PTHREAD_MUTEX_INITIALIZER;

static void pin(void *at, size_t bytes) {
    pthread_mutex_lock(&pinning);
    int i = 0;
    while (i < pinned_count && pinned[i].bytes) i++;
    if (i < PINNED) {
        pinned[i].at = at, pinned[i].bytes = bytes ? bytes : 1;
        if (i == pinned_count) pinned_count++;
    }
    pthread_mutex_unlock(&pinning);
}

static void unpin(const void *at) {
    pthread_mutex_lock(&pinning);
    for (int i = 0; i < pinned_count; i++)
        if (pinned[i].at == at) pinned[i].bytes = 0;
    pthread_mutex_unlock(&pinning);
}

static int is_pinned(const char *at) {
    int found = 0;
    pthread_mutex_lock(&pinning);
    for (int i = 0; i < pinned_count && !found; i++)
        found = at >= pinned[i].at && at < pinned[i].at + pinned[i].bytes;
    pthread_mutex_unlock(&pinning);
    return found;
}

cudaError_t cudaHostAlloc(void **at, size_t bytes, unsigned flags) {
    (void)flags;
    if (posix_memalign(at, 4096, bytes)) return full();
    pin(*at, bytes);
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void *at) {
    unpin(at);
    free(at);
    return cudaSuccess;
}

cudaError_t cudaHostRegister(void *at, size_t bytes, unsigned flags) {
    (void)flags;
    pin(at, bytes);
    return cudaSuccess;
}

cudaError_t cudaHostUnregister(void *at) { unpin(at); return cudaSuccess; }

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *of, const void *at) {
    int on_card = card_has(at);
    memset(of, 0, sizeof *of);
    of->type = on_card ? cudaMemoryTypeDevice : is_pinned(at) ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    of->device = card_of(at);
    of->devicePointer = on_card ? (void *)at : NULL;
    of->hostPointer = on_card ? NULL : (void *)at;
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    (void)kind;
    card_copy(to, from, bytes);
    /* No kernel computed a flag, and what libraries ask on the way is whether all is plain: nothing padded or packed. */
    if (bytes == 1 && card_has(from) && !card_has(to) && !card_values_real()) *(char *)to = 1;
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t on) {
    (void)on;
    return cudaMemcpy(to, from, bytes, kind);
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, enum cudaMemcpyKind kind, cudaStream_t on) {
    (void)kind, (void)on;
    if (width * height <= SMALL || !card_has(to))
        for (size_t row = 0; row < height; row++)
            memmove((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
    return cudaSuccess;
}

cudaError_t cudaMemset(void *to, int value, size_t bytes) { card_fill(to, value, bytes); return cudaSuccess; }

cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t on) {
    (void)on;
    return cudaMemset(to, value, bytes);
}

cudaError_t cudaGetSymbolAddress(void **at, const void *symbol) { *at = (void *)symbol; return cudaSuccess; }

/* The card. */

cudaError_t cudaGetDeviceCount(int *count) {
    *count = card()->visible;
    return *count ? cudaSuccess : (last = cudaErrorNoDevice);
}
cudaError_t cudaGetDevice(int *device) { *device = card_current(); return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return card_select(device) ? (last = cudaErrorInvalidDevice) : cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { *version = RELEASE; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = RELEASE; return cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    (void)device;
    *value = card_attribute(attribute);
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *id, int length, int device) {
    snprintf(id, length, "0000:%02x:00.0", device);
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0, *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    (void)device, (void)peer;
    *can = 0;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    (void)device;
    const struct card *c = card();
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "%s", c->name);
    p->totalGlobalMem = c->total;
    p->major = c->major, p->minor = c->minor;
    p->multiProcessorCount = c->multiprocessors;
    p->sharedMemPerBlock = card_attribute(cudaDevAttrMaxSharedMemoryPerBlock);
    p->sharedMemPerBlockOptin = c->shared_memory;
    p->sharedMemPerMultiprocessor = card_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    p->reservedSharedMemPerBlock = card_attribute(cudaDevAttrReservedSharedMemoryPerBlock);
    p->regsPerBlock = p->regsPerMultiprocessor = card_attribute(cudaDevAttrMaxRegistersPerBlock);
    p->warpSize = card_attribute(cudaDevAttrWarpSize);
    p->memPitch = card_attribute(cudaDevAttrMaxPitch);
    p->maxThreadsPerBlock = card_attribute(cudaDevAttrMaxThreadsPerBlock);
    p->maxThreadsPerMultiProcessor = card_attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
    p->maxBlocksPerMultiProcessor = card_attribute(cudaDevAttrMaxBlocksPerMultiprocessor);
    for (int i = 0; i < 3; i++) {
        p->maxThreadsDim[i] = card_attribute(cudaDevAttrMaxBlockDimX + i);
        p->maxGridSize[i] = card_attribute(cudaDevAttrMaxGridDimX + i);
    }
    p->totalConstMem = card_attribute(cudaDevAttrTotalConstantMemory);
    p->textureAlignment = card_attribute(cudaDevAttrTextureAlignment);
    p->memoryBusWidth = card_attribute(cudaDevAttrGlobalMemoryBusWidth);
    p->l2CacheSize = card_attribute(cudaDevAttrL2CacheSize);
    p->canMapHostMemory = p->concurrentKernels = p->unifiedAddressing = p->streamPrioritiesSupported = 1;
    p->managedMemory = p->concurrentManagedAccess = p->cooperativeLaunch = p->hostRegisterSupported = 1;
    return cudaSuccess;
}

/* Streams and events: nothing is ever waiting. An event is the host's time. */

static cudaError_t some(void **handle) { *handle = calloc(1, 64); return cudaSuccess; }

cudaError_t cudaStreamCreate(cudaStream_t *s) { return some((void **)s); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) {
    (void)flags, (void)priority;
    return some((void **)s);
}
cudaError_t cudaStreamGetPriority(cudaStream_t s, int *priority) { (void)s; *priority = 0; return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status) {
    (void)s;
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **on,
#if CUDART_VERSION >= 13000
                                     const cudaGraphEdgeData **edges,
#endif
                                     size_t *count) {
    (void)graph, (void)on;
    if (id) *id = 0;
    if (count) *count = 0;
    return cudaStreamIsCapturing(s, status);
}
cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t call, void *with) { (void)s; call(with); return cudaSuccess; }
cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t call, void *with, unsigned flags) {
    (void)flags;
    call(s, cudaSuccess, with);
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *e) { return some((void **)e); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) { (void)flags; return some((void **)e); }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
    (void)s;
    clock_gettime(CLOCK_MONOTONIC, (struct timespec *)e);
    return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned flags) {
    (void)flags;
    return cudaEventRecord(e, s);
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
    struct timespec *a = (struct timespec *)from, *b = (struct timespec *)to;
    *ms = (b->tv_sec - a->tv_sec) * 1e3 + (b->tv_nsec - a->tv_nsec) / 1e6;
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t e) { free(e); return cudaSuccess; }

/* Kernels are looked up and launched, and do nothing. */

#define KERNELS (1 << 18)
static struct { const void *function, *binary; const char *name; } kernels[KERNELS];

static size_t kernel_slot(const void *function) {
    size_t i = ((size_t)function >> 4) * 0x9e3779b97f4a7c15u >> 46;
    while (kernels[i].function && kernels[i].function != function) i = (i + 1) % KERNELS;
    return i;
}

/* A binary of a library holds machine code for several architectures, as nvcc (-gencode) was told; a card takes the
 * newest of its own generation that is not newer than itself: 8.9 runs 8.6's, or 8.0's where PyTorch's build for arm64
 * has no 8.6. Layout: fatbinary_section.h for where it lies; its own headers have been the same since CUDA 4. */
struct fat_wrapper { int magic, version; const char *data; void *more; };
struct fat_header { unsigned magic; unsigned short version, bytes; unsigned long long following; };
struct fat_entry {
    unsigned short kind, version; /* 1: PTX, 2: machine code */
    unsigned bytes;
    unsigned long long following;
    unsigned unread[3], architecture;
};

/* 86 for 8.6; the card's own where the binary is not known or has nothing for it. */
static int architecture(const void *binary) {
    const struct card *c = card();
    int own = c->major * 10 + c->minor, best = 0;
    const struct fat_wrapper *wrapper = binary;
    const struct fat_header *header = wrapper && wrapper->magic == 0x466243b1 ? (const void *)wrapper->data : NULL;
    if (!header || header->magic != 0xba55ed50) return own;
    const char *at = (const char *)header + header->bytes, *end = at + header->following;
    while (at + sizeof(struct fat_entry) <= end) {
        const struct fat_entry *entry = (const void *)at;
        int for_ = entry->architecture;
        if (entry->kind == 2 && for_ / 10 == c->major && for_ <= own && for_ > best) best = for_;
        at += entry->bytes + entry->following;
    }
    return best ? best : own;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *of, const void *kernel) {
    (void)kernel;
    memset(of, 0, sizeof *of);
    of->maxThreadsPerBlock = 1024;
    of->numRegs = 64;
    /* CUB asks, and fails for one that it was not compiled for. */
    of->ptxVersion = of->binaryVersion = architecture(kernels[kernel_slot(kernel)].binary);
    of->maxDynamicSharedSizeBytes = card()->shared_memory;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *kernel, int threads, size_t shared) {
    (void)kernel, (void)shared;
    *blocks = threads > 0 ? 1024 / threads : 1; /* 64 registers a thread */
    if (*blocks < 1) *blocks = 1;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *kernel, int threads,
                                                                   size_t shared, unsigned flags) {
    (void)flags;
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, threads, shared);
}
void **__cudaRegisterFatBinary(void *binary) {
    void **handle = malloc(sizeof *handle);
    *handle = binary;
    return handle;
}
void __cudaUnregisterFatBinary(void **handle) { free(handle); }
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}

/* One thing that shapes depend on is counted: how many elements are not zero (aten/src/ATen/native/cuda/Nonzero.cu,
 * with cub's reduction). Where values are real it is what is there; of floats, or where nobody has worked anything out,
 * it is all of them: nothing is padded or masked, as every flag is true. */

void __cudaRegisterFunction(void **binary, const char *function, char *device, const char *name, int threads, void *a,
                            void *b, void *c, void *d, int *e) {
    (void)device, (void)threads, (void)a, (void)b, (void)c, (void)d, (void)e;
    if (!strstr(name, "18DeviceReduceKernel") && !strstr(name, "28DeviceReduceSingleTileKernel") &&
        !strstr(name, "11EmptyKernel")) /* which CUB asks for its architecture */
        return;
    size_t i = kernel_slot(function);
    kernels[i].function = function;
    kernels[i].binary = *binary;
    kernels[i].name = name;
}

/* Bytes of an element by the type in a kernel's mangled name, 0 for a float. */
static size_t element(const char *name) {
    const char *at = strstr(name, "NonZeroOpI");
    switch (at ? at[10] : 0) {
    case 'b': case 'a': case 'h': return 1;
    case 's': case 't': return 2;
    case 'i': case 'j': return 4;
    case 'l': case 'm': return 8;
    default: return 0;
    }
}

static int nonzero(const char *at, size_t number, size_t bytes) {
    static const char zero[8];
    int found = 0;
    for (size_t i = 0; i < number; i++) found += memcmp(at + i * bytes, zero, bytes) != 0;
    return found;
}

static void launched(const void *function, void **arguments) {
    static __thread int count = -1;
    const char *name = kernels[kernel_slot(function)].name;
    if (!name) return;
    /* DeviceReduceKernel(in, partial sums, number, ...), then DeviceReduceSingleTileKernel(in, out, number, ...) */
    if (strstr(name, "NonZeroOp")) {
        size_t number = *(unsigned long long *)arguments[2], bytes = element(name);
        /* thrust's iterator begins with its pointer, cub's own, as CUDA 12 has it, with its function, which is empty */
        const char *at = ((const char **)arguments[0])[strstr(name, "22TransformInputIterator") != NULL];
        count = card_values_real() && bytes && card_has(at) ? nonzero(at, number, bytes) : (int)number;
    }
    if (count >= 0 && strstr(name, "DeviceReduceSingleTileKernel")) {
        **(int **)arguments[1] = count;
        count = -1;
    }
}

cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                             cudaStream_t on) {
    (void)grid, (void)block, (void)shared, (void)on;
    launched(function, arguments);
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                               cudaStream_t on) {
    return cudaLaunchKernel((const void *)kernel, grid, block, arguments, shared, on);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **arguments) {
    (void)config;
    launched(function, arguments);
    return cudaSuccess;
}

/* Errors. */

cudaError_t cudaGetLastError(void) { cudaError_t was = last; last = cudaSuccess; return was; }
cudaError_t cudaPeekAtLastError(void) { return last; }
const char *cudaGetErrorName(cudaError_t e) {
    return e == cudaSuccess ? "cudaSuccess" : e == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaError";
}
const char *cudaGetErrorString(cudaError_t e) {
    return e == cudaSuccess ? "no error" : e == cudaErrorMemoryAllocation ? "out of memory" : "an error";
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult *found) {
    void *driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_GLOBAL);
    int (*look_up)(const char *, void **, int, unsigned long long, int *) = driver ? dlsym(driver, "cuGetProcAddress_v2") : NULL;
    if (!look_up) return last = cudaErrorInitializationError;
    look_up(name, function, version, flags, NULL);
    if (found) *found = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
#if CUDART_VERSION < 13000
cudaError_t cudaGetDriverEntryPoint(const char *name, void **function, unsigned long long flags,
                                    enum cudaDriverEntryPointQueryResult *found) {
    return cudaGetDriverEntryPointByVersion(name, function, RELEASE, flags, found);
}
#endif
