// A driver's library for tests: it answers as the driver of a machine with COUNT cards of compute capability MAJOR.0 does,
// as far as a process asks before it computes. VERSION is the CUDA version times 1000.
#include <stdio.h>
#include <string.h>

int cuInit(unsigned flags) { (void)flags; return COUNT == 0 ? 100 : 0; }
int cuDriverGetVersion(int *version) { *version = VERSION; return 0; }
int cuDeviceGetCount(int *count) { *count = COUNT; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
// 75 and 76 are the compute capability; anything else that is asked for counts something.
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    *value = attribute == 75 ? MAJOR : attribute == 76 ? 0 : 1;
    return 0;
}
int cuDeviceGetName(char *name, int length, int device) {
    (void)device;
    snprintf(name, length, "Test GPU");
    return 0;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) { (void)device; *bytes = (size_t)1 << 30; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { (void)device; *context = (void *)1; return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { (void)device; return 0; }
int cuCtxSetCurrent(void *context) { (void)context; return 0; }
