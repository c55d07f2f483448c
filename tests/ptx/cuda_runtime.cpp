// A CUDA runtime that knows no GPU: it hands every launch to a function of Python's (cuda.py). It has the functions
// that code from nvcc calls, for csrc/cuda, and replaces the runtime library in what it is linked into.

#include <cstddef>
#include <map>
#include <string>

namespace {

struct Dim3 {
  unsigned x, y, z;
};

struct Configuration {
  Dim3 grid, block;
  size_t shared;
  void* stream;
};

// The sizes of a launch: those of its grid and of a block in x, y and z, and the bytes of dynamic shared memory.
using Execute = int (*)(const char* kernel, const unsigned sizes[7], void** parameters);

Execute execute = nullptr;
thread_local Configuration pushed;
thread_local int last_error = 0;

std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> names;  // by the address of their function on the host
  return names;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void runtime_execute_by(Execute function) { execute = function; }

void** __cudaRegisterFatBinary(void* binary) { return static_cast<void**>(binary); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}

void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, void*, void*, void*, void*,
                            int*) {
  kernels()[function] = name;
}

unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void* stream) {
  pushed = {grid, block, shared, stream};
  return 0;
}

int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared, void* stream) {
  *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared;
  *static_cast<void**>(stream) = pushed.stream;
  return 0;
}

int cudaLaunchKernel(const void* function, Dim3 grid, Dim3 block, void** parameters, size_t shared, void*) {
  const unsigned sizes[7] = {grid.x, grid.y, grid.z, block.x, block.y, block.z, static_cast<unsigned>(shared)};
  return last_error = execute ? execute(kernels().at(function).c_str(), sizes, parameters) : 1;
}

// Since CUDA 13 nvcc calls these two. A handle of a kernel is the address of its function on the host.
int __cudaGetKernel(const void** kernel, const void* function) {
  *kernel = function;
  return 0;
}

int __cudaLaunchKernel(const void* kernel, Dim3 grid, Dim3 block, void** parameters, size_t shared, void* stream) {
  return cudaLaunchKernel(kernel, grid, block, parameters, shared, stream);
}

int cudaFuncSetAttribute(const void*, int, int) { return 0; }
int cudaGetLastError() {
  const int error = last_error;
  last_error = 0;
  return error;
}
const char* cudaGetErrorString(int) { return "the launch failed"; }
}
