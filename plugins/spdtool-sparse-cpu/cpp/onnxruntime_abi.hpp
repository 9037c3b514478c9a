// The part of onnxruntime's C interface that a custom operator needs, declared by hand.
//
// Its headers are not used: the onnxruntime wheels have none, nor has any package that pip could install at build time. The C
// interface is a table of functions whose order is never changed, only added to, so that a slot number stays valid;
// `tests/` opens sessions with every function used here. Version 17 of the interface is requested, which onnxruntime 1.17
// and every later one provides.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace sparse_cpu::ort {

constexpr uint32_t kApiVersion = 17;

struct Status;
struct KernelInfo;
struct KernelContext;
struct Value;
struct ShapeInfo;
struct Domain;
struct SessionOptions;

// The slots of the function table.
enum Slot : int {
  kCreateStatus = 0,
  kGetErrorMessage = 2,
  kCreateCustomOpDomain = 26,
  kCustomOpDomainAdd = 27,
  kAddCustomOpDomain = 28,
  kGetTensorMutableData = 51,
  kGetTensorElementType = 60,
  kGetDimensionsCount = 61,
  kGetDimensions = 62,
  kGetTensorTypeAndShape = 65,
  kKernelInfoGetAttributeFloat = 85,
  kKernelInfoGetAttributeInt64 = 86,
  kKernelInfoGetAttributeString = 87,
  kKernelContextGetInput = 90,
  kKernelContextGetOutput = 91,
  kReleaseStatus = 93,
  kReleaseTensorTypeAndShapeInfo = 99,
  kKernelInfoGetConstantInput = 249,
  kKernelContextParallelFor = 274,
};

enum ElementType : int { kUndefined = 0, kFloat = 1, kUint8 = 2, kInt64 = 7 };
enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };
enum Characteristic : int { kRequired = 0, kOptional = 1, kVariadic = 2 };

struct ApiBase {
  const void* (*get_api)(uint32_t version);
  const char* (*version)();
};

// The functions that onnxruntime calls of a custom operator; their order is the interface.
struct CustomOp {
  uint32_t version;
  void* (*create_kernel)(const CustomOp*, const void* api, const KernelInfo*);
  const char* (*name)(const CustomOp*);
  const char* (*provider)(const CustomOp*);
  int (*input_type)(const CustomOp*, size_t);
  size_t (*input_count)(const CustomOp*);
  int (*output_type)(const CustomOp*, size_t);
  size_t (*output_count)(const CustomOp*);
  void (*compute)(void* kernel, KernelContext*);
  void (*destroy)(void* kernel);
  int (*input_characteristic)(const CustomOp*, size_t);
  int (*output_characteristic)(const CustomOp*, size_t);
  int (*input_memory)(const CustomOp*, size_t);
  int (*variadic_input_least)(const CustomOp*);
  int (*variadic_input_alike)(const CustomOp*);
  int (*variadic_output_least)(const CustomOp*);
  int (*variadic_output_alike)(const CustomOp*);
  Status* (*create_kernel_v2)(const CustomOp*, const void* api, const KernelInfo*, void** kernel);
  Status* (*compute_v2)(void* kernel, KernelContext*);
  Status* (*infer_shape)(const CustomOp*, void*);
  int (*start_version)(const CustomOp*);
  int (*end_version)(const CustomOp*);
  size_t (*may_inplace)(int**, int**);
  void (*release_may_inplace)(int*, int*);
  size_t (*alias)(int**, int**);
  void (*release_alias)(int*, int*);
};

// Wraps the function table; every call that fails throws.
class Api {
 public:
  explicit Api(const void* table = nullptr) : table_(static_cast<void* const*>(table)) {}

  explicit operator bool() const { return table_ != nullptr; }

  Status* status(ErrorCode code, const char* message) const {
    return function<Status*(int, const char*)>(kCreateStatus)(code, message);
  }

  template <class... Arguments>
  void call(Slot slot, Arguments... arguments) const {
    if (Status* failed = function<Status*(Arguments...)>(slot)(arguments...)) {
      const std::string message = function<const char*(const Status*)>(kGetErrorMessage)(failed);
      function<void(Status*)>(kReleaseStatus)(failed);
      throw std::runtime_error(message);
    }
  }

  int64_t integer(const KernelInfo* info, const char* name) const {
    int64_t value = 0;
    call(kKernelInfoGetAttributeInt64, info, name, &value);
    return value;
  }
  float number(const KernelInfo* info, const char* name) const {
    float value = 0;
    call(kKernelInfoGetAttributeFloat, info, name, &value);
    return value;
  }
  std::string text(const KernelInfo* info, const char* name) const {
    size_t size = 0;
    call(kKernelInfoGetAttributeString, info, name, static_cast<char*>(nullptr), &size);
    std::string value(size, '\0');
    call(kKernelInfoGetAttributeString, info, name, value.data(), &size);
    value.resize(size ? size - 1 : 0);  // the size counts the terminator
    return value;
  }

  // `otherwise` where there is no such attribute.
  std::string text(const KernelInfo* info, const char* name, const char* otherwise) const {
    try {
      return text(info, name);
    } catch (const std::runtime_error&) {
      return otherwise;
    }
  }

  std::vector<int64_t> shape(const Value* value) const { return describe(value).second; }
  int type(const Value* value) const { return describe(value).first; }

  template <class T>
  T* data(const Value* value) const {
    void* bytes = nullptr;
    call(kGetTensorMutableData, const_cast<Value*>(value), &bytes);
    return static_cast<T*>(bytes);
  }

  // Null where the model does not give a constant.
  const Value* constant(const KernelInfo* info, size_t index) const {
    int constant = 0;
    const Value* value = nullptr;
    call(kKernelInfoGetConstantInput, info, index, &constant, &value);
    return constant ? value : nullptr;
  }

  // Null for an optional input that is not given.
  const Value* input(const KernelContext* context, size_t index) const {
    const Value* value = nullptr;
    call(kKernelContextGetInput, context, index, &value);
    return value;
  }
  Value* output(KernelContext* context, size_t index, const std::vector<int64_t>& shape) const {
    Value* value = nullptr;
    call(kKernelContextGetOutput, context, index, shape.data(), shape.size(), &value);
    return value;
  }

  // Calls work(user, i) for i in [0, count) on the threads of the session.
  void parallel(const KernelContext* context, size_t count, void (*work)(void*, size_t), void* user) const {
    call(kKernelContextParallelFor, context, work, count, size_t(0), user);
  }

 private:
  template <class Signature>
  Signature* function(int slot) const {
    return reinterpret_cast<Signature*>(table_[slot]);
  }

  std::pair<int, std::vector<int64_t>> describe(const Value* value) const {
    ShapeInfo* info = nullptr;
    call(kGetTensorTypeAndShape, value, &info);
    int type = kUndefined;
    size_t count = 0;
    call(kGetTensorElementType, static_cast<const ShapeInfo*>(info), &type);
    call(kGetDimensionsCount, static_cast<const ShapeInfo*>(info), &count);
    std::vector<int64_t> sizes(count);
    call(kGetDimensions, static_cast<const ShapeInfo*>(info), sizes.data(), count);
    function<void(ShapeInfo*)>(kReleaseTensorTypeAndShapeInfo)(info);
    return {type, sizes};
  }

  void* const* table_;
};

}  // namespace sparse_cpu::ort
