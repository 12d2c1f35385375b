// What this library uses of ONNX Runtime's C interface, which is append-only: entries are reached by
// their places in the table of functions, so that no header of a particular version is needed.

#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

struct Status;
struct KernelInfo;
struct KernelContext;
struct Value;
struct ShapeInfo;
struct SessionOptions;
struct CustomOpDomain;

using Api = const void*;  // the first entry of the table

struct ApiBase {
  const Api*(*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

constexpr uint32_t kApiVersion = 17;  // ONNX Runtime 1.17, the first with every entry below

enum ElementType { kAnyType = 0, kFloat = 1, kUint8 = 2, kFloat16 = 10 };
enum Characteristic { kRequired = 0, kOptional = 1 };


struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const Api*, const KernelInfo*);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  ElementType (*GetInputType)(const CustomOp*, size_t);
  size_t (*GetInputTypeCount)(const CustomOp*);
  ElementType (*GetOutputType)(const CustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void*, KernelContext*);
  void (*KernelDestroy)(void*);
  Characteristic (*GetInputCharacteristic)(const CustomOp*, size_t);
  Characteristic (*GetOutputCharacteristic)(const CustomOp*, size_t);
  int (*GetInputMemoryType)(const CustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  Status* (*CreateKernelV2)(const CustomOp*, const Api*, const KernelInfo*, void**);
  Status* (*KernelComputeV2)(void*, KernelContext*);
  Status* (*InferOutputShapeFn)(const CustomOp*, void*);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
};

template <int Place, typename Result, typename... Arguments>
inline Result call(const Api* api, Arguments... arguments) {
  using Function = Result (*)(Arguments...);
  return reinterpret_cast<Function>(const_cast<void*>(api[Place]))(arguments...);
}

inline Status* create_status(const Api* api, const char* message) {
  return call<0, Status*>(api, 1 /* fail */, message);
}
inline void release_status(const Api* api, Status* status) { call<93, void>(api, status); }

inline Status* create_domain(const Api* api, const char* name, CustomOpDomain** domain) {
  return call<26, Status*>(api, name, domain);
}
inline Status* add_op(const Api* api, CustomOpDomain* domain, const CustomOp* op) {
  return call<27, Status*>(api, domain, op);
}
inline Status* add_domain(const Api* api, SessionOptions* options, CustomOpDomain* domain) {
  return call<28, Status*>(api, options, domain);
}

inline Status* attribute(const Api* api, const KernelInfo* info, const char* name, int64_t* value) {
  return call<86, Status*>(api, info, name, value);
}
inline Status* attribute(const Api* api, const KernelInfo* info, const char* name, char* value,
                         size_t* size) {
  return call<87, Status*>(api, info, name, value, size);
}

inline Status* input(const Api* api, const KernelContext* context, size_t index,
                     const Value** value) {
  return call<90, Status*>(api, context, index, value);
}
inline Status* output(const Api* api, KernelContext* context, size_t index, const int64_t* shape,
                      size_t rank, Value** value) {
  return call<91, Status*>(api, context, index, shape, rank, value);
}
inline Status* data(const Api* api, const Value* value, void** pointer) {
  return call<51, Status*>(api, const_cast<Value*>(value), pointer);
}
inline Status* shape_of(const Api* api, const Value* value, ShapeInfo** info) {
  return call<65, Status*>(api, value, info);
}
inline Status* element_type(const Api* api, const ShapeInfo* info, ElementType* type) {
  return call<60, Status*>(api, info, type);
}
inline Status* rank(const Api* api, const ShapeInfo* info, size_t* count) {
  return call<61, Status*>(api, info, count);
}
inline Status* dimensions(const Api* api, const ShapeInfo* info, int64_t* values, size_t count) {
  return call<62, Status*>(api, info, values, count);
}
inline Status* element_count(const Api* api, const ShapeInfo* info, size_t* count) {
  return call<64, Status*>(api, info, count);
}
inline void release(const Api* api, ShapeInfo* info) { call<99, void>(api, info); }

inline Status* parallel_for(const Api* api, const KernelContext* context,
                            void (*body)(void*, size_t), size_t total, void* data) {
  return call<274, Status*>(api, context, body, total, size_t{0}, data);
}

}  // namespace ort
