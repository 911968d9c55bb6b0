/* What PyTorch reads back from NVIDIA's libraries on the way of a training step: handles, versions, one way to
 * multiply. Everything else of them is a function that returns success (build.py). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static int some(void **handle) { *handle = calloc(1, 4096); return 0; }

#ifdef CUBLAS
int cublasCreate_v2(void **handle) { return some(handle); }
int cublasDestroy_v2(void *handle) { free(handle); return 0; }
int cublasGetMathMode(void *handle, int *mode) { (void)handle; *mode = 0; return 0; }
int cublasGetPointerMode_v2(void *handle, int *mode) { (void)handle; *mode = 0; return 0; }
#endif

#ifdef CUBLASLT
/* Descriptors are made for each product, and nobody reads them: one does for all. */
static int one(void **handle) { static char descriptor[4096]; *handle = descriptor; return 0; }
size_t cublasLtGetVersion(void) { return RELEASE / 1000 * 10000 + RELEASE % 1000 * 10; } /* no older than CUDA */
int cublasLtCreate(void **handle) { return some(handle); }
int cublasLtMatmulDescCreate(void **d, int compute, int scale) { (void)compute, (void)scale; return one(d); }
int cublasLtMatrixLayoutCreate(void **l, int type, uint64_t rows, uint64_t columns, int64_t ld) {
    (void)type, (void)rows, (void)columns, (void)ld;
    return one(l);
}
int cublasLtMatmulPreferenceCreate(void **p) { return one(p); }
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d, void *preference,
                                   int asked, void *results, int *found) {
    (void)handle, (void)operation, (void)a, (void)b, (void)c, (void)d, (void)preference;
    if (asked > 0) memset(results, 0, 96); /* cublasLtMatmulHeuristicResult_t: no workspace, success */
    *found = asked > 0;
    return 0;
}
#endif

#ifdef CUDNN
size_t cudnnGetVersion(void) { return CUDNN_MAJOR * (CUDNN_MAJOR < 9 ? 1000 : 10000) + CUDNN_MINOR * 100 + CUDNN_PATCH; }
int cudnnGetProperty(int which, int *value) { /* libraryPropertyType of library_types.h */
    *value = which == 0 ? CUDNN_MAJOR : which == 1 ? CUDNN_MINOR : CUDNN_PATCH;
    return 0;
}
size_t cudnnGetCudartVersion(void) { return RELEASE; }
int cudnnCreate(void **handle) { return some(handle); }
/* PyTorch describes a convolution, asks which engines take it, makes a plan of the first that does, and allocates what
 * that plan works in (aten/src/ATen/native/cudnn/Conv_v8.cpp). There is one engine here, it takes all, in nothing. */
int cudnnBackendCreateDescriptor(int type, void **descriptor) { (void)type; *descriptor = calloc(1, 8); return 0; }
int cudnnBackendDestroyDescriptor(void *descriptor) { free(descriptor); return 0; }
int cudnnBackendGetAttribute(void *descriptor, int name, int type, int64_t asked, int64_t *count, void *values) {
    (void)descriptor, (void)name;
    int whole = type == 3, other = type == 15; /* CUDNN_TYPE_INT64; CUDNN_TYPE_BACKEND_DESCRIPTOR: the caller made them */
    if (whole && asked > 0 && values) *(int64_t *)values = 0;
    if (count) *count = whole || other;
    return 0;
}
#endif

#ifdef NVRTC /* kernels that PyTorch compiles when they are first used */
int nvrtcVersion(int *major, int *minor) { *major = RELEASE / 1000, *minor = RELEASE % 1000 / 10; return 0; }
int nvrtcCreateProgram(void **program, const char *text, const char *name, int n, const char **headers, const char **names) {
    (void)text, (void)name, (void)n, (void)headers, (void)names;
    return some(program);
}
int nvrtcGetCUBINSize(void *program, size_t *size) { (void)program; *size = 1; return 0; }
int nvrtcGetPTXSize(void *program, size_t *size) { (void)program; *size = 1; return 0; }
int nvrtcGetProgramLogSize(void *program, size_t *size) { (void)program; *size = 1; return 0; }
int nvrtcGetCUBIN(void *program, char *to) { (void)program; *to = 0; return 0; }
int nvrtcGetPTX(void *program, char *to) { (void)program; *to = 0; return 0; }
int nvrtcGetProgramLog(void *program, char *to) { (void)program; *to = 0; return 0; }
int nvrtcGetLoweredName(void *program, const char *name, const char **lowered) { (void)program; *lowered = name; return 0; }
#endif

#ifdef NCCL /* communicators are there at once, and know their place; what they move nobody moves. nccl.h, 2.28 */
struct communicator { int ranks, rank; };

static int communicator(struct communicator **c, int ranks, int rank) {
    *c = calloc(1, sizeof **c);
    (*c)->ranks = ranks, (*c)->rank = rank;
    return 0;
}

int ncclGetVersion(int *version) { *version = NCCL_MAJOR * 10000 + NCCL_MINOR * 100 + NCCL_PATCH; return 0; }
int ncclGetUniqueId(void *id) { memset(id, 0, 128); return 0; }
const char *ncclGetErrorString(int e) { (void)e; return "no error"; }
const char *ncclGetLastError(void *c) { (void)c; return ""; }
int ncclCommGetAsyncError(void *c, int *e) { (void)c; *e = 0; return 0; }
int ncclCommCount(struct communicator *c, int *ranks) { *ranks = c->ranks; return 0; }
int ncclCommUserRank(struct communicator *c, int *rank) { *rank = c->rank; return 0; }
int ncclCommInitRankScalable(struct communicator **c, int ranks, int rank, int ids, void *id, void *config) {
    (void)ids, (void)id, (void)config;
    return communicator(c, ranks, rank);
}
typedef struct { char of[128]; } unique_id; /* passed by value */
int ncclCommInitRankConfig(struct communicator **c, int ranks, unique_id id, int rank, void *config) {
    (void)id, (void)config;
    return communicator(c, ranks, rank);
}
int ncclCommInitRank(struct communicator **c, int ranks, unique_id id, int rank) {
    return ncclCommInitRankConfig(c, ranks, id, rank, NULL);
}
int ncclCommInitAll(struct communicator **c, int ranks, const int *cards) {
    (void)cards;
    for (int rank = 0; rank < ranks; rank++) communicator(&c[rank], ranks, rank);
    return 0;
}
/* How many others have the same colour is not told: as many as there are, of whom this one keeps its place. */
int ncclCommSplit(struct communicator *from, int color, int key, struct communicator **c, void *config) {
    (void)config;
    *c = NULL;
    return color < 0 ? 0 : communicator(c, from->ranks, key);
}
int ncclCommShrink(struct communicator *from, int *without, int count, struct communicator **c, void *config, int flags) {
    (void)without, (void)config, (void)flags;
    return communicator(c, from->ranks - count, 0);
}
int ncclCommDestroy(void *c) { free(c); return 0; }
int ncclCommAbort(void *c) { free(c); return 0; }
int ncclCommRegister(void *c, void *at, size_t bytes, void **handle) {
    (void)c, (void)at, (void)bytes;
    *handle = c;
    return 0;
}
int ncclCommWindowRegister(void *c, void *at, size_t bytes, void **window, int flags) {
    (void)flags;
    return ncclCommRegister(c, at, bytes, window);
}
int ncclRedOpCreatePreMulSum(int *op, void *scalar, int type, int where, void *c) {
    (void)scalar, (void)type, (void)where, (void)c;
    *op = 5; /* the first that is not built in */
    return 0;
}
int ncclMemAlloc(void **at, size_t bytes) { /* of the card, as cudaMalloc hands it out */
    int (*allocate)(void **, size_t) = dlsym(RTLD_DEFAULT, "cudaMalloc");
    return allocate && !allocate(at, bytes) ? 0 : 1;
}
int ncclMemFree(void *at) {
    int (*release)(void *) = dlsym(RTLD_DEFAULT, "cudaFree");
    return release && !release(at) ? 0 : 1;
}
#endif

#ifdef NVIDIA /* management: what PyTorch looks up by name before it maps expandable segments */
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char *id, void **device) { (void)id; return some(device); }
int nvmlDeviceGetNvLinkRemoteDeviceType(void *device, unsigned link, int *type) { (void)device, (void)link, (void)type; return 3; }
int nvmlDeviceGetNvLinkRemotePciInfo_v2(void *device, unsigned link, void *info) { (void)device, (void)link, (void)info; return 3; }
int nvmlDeviceGetComputeRunningProcesses(void *device, unsigned *count, void *infos) { (void)device, (void)infos; *count = 0; return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = RELEASE; return 0; }
int nvmlDeviceGetGpuFabricInfoV(void *device, void *info) { (void)device, (void)info; return 0; } /* state 0: none */
#endif
