/* What PyTorch reads back from NVIDIA's libraries on the way of a training step: handles, versions, one way to
 * multiply. Everything else of them is a function that returns success (build.py). */
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
size_t cudnnGetVersion(void) { return 91900; }
size_t cudnnGetCudartVersion(void) { return 13000; }
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
int nvrtcVersion(int *major, int *minor) { *major = 13, *minor = 0; return 0; }
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

#ifdef NCCL
int ncclGetVersion(int *version) { *version = 22809; return 0; }
#endif

#ifdef NVIDIA /* management: what PyTorch looks up by name before it maps expandable segments */
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char *id, void **device) { (void)id; return some(device); }
int nvmlDeviceGetNvLinkRemoteDeviceType(void *device, unsigned link, int *type) { (void)device, (void)link, (void)type; return 3; }
int nvmlDeviceGetNvLinkRemotePciInfo_v2(void *device, unsigned link, void *info) { (void)device, (void)link, (void)info; return 3; }
int nvmlDeviceGetComputeRunningProcesses(void *device, unsigned *count, void *infos) { (void)device, (void)infos; *count = 0; return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 13000; return 0; }
int nvmlDeviceGetGpuFabricInfoV(void *device, void *info) { (void)device, (void)info; return 0; } /* state 0: none */
#endif
