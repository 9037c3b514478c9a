// The operators SparseLinear and SparseEncoder of the domain "spdtool", as onnxruntime loads them.
//
// No exception leaves this file: it becomes a status, which onnxruntime raises in the user's language.
#include <limits>
#include <memory>
#include <mutex>

#include "encoder.hpp"
#include "linear.hpp"
#include "onnxruntime_abi.hpp"

#ifndef SPDTOOL_SPARSE_CPU_VERSION
#error "the build gives the version"
#endif

#if defined(_WIN32)
#define SPARSE_EXPORT extern "C" __declspec(dllexport)
#else
#define SPARSE_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace sparse_cpu {
namespace {

ort::Api api;

template <class Work>
ort::Status* guarded(Work&& work) {
  try {
    work();
    return nullptr;
  } catch (const InputError& error) {
    return api.status(ort::kInvalidArgument, error.what());
  } catch (const std::bad_alloc&) {
    return api.status(ort::kFail, "spdtool: out of memory");
  } catch (const std::exception& error) {
    return api.status(ort::kFail, error.what());
  } catch (...) {
    return api.status(ort::kFail, "spdtool: unknown error");
  }
}

Activation activation_named(const std::string& name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  throw PackedError("unknown activation " + name);
}

Reads reads_named(const std::string& name) {
  if (name == "first") return Reads::kFirst;
  if (name == "mean") return Reads::kMean;
  if (name == "real") return Reads::kReal;
  if (name == "all") return Reads::kEvery;
  throw PackedError("unknown output " + name);
}

LayerKind kind_named(const std::string& name) {
  if (name == "bert") return LayerKind::kBert;
  if (name == "mpnet") return LayerKind::kMpnet;
  if (name == "deberta-v2") return LayerKind::kDeberta;
  if (name == "modernbert") return LayerKind::kModernBert;
  throw PackedError("an encoder of the kind " + name + ", which this version of the library does not know");
}

const ort::Value* constant(const ort::KernelInfo* info, size_t index, int type, const std::string& name) {
  const ort::Value* value = api.constant(info, index);
  if (value == nullptr) throw PackedError(name + ": input " + std::to_string(index) + " is not a constant of the model");
  if (api.type(value) != type) throw PackedError(name + ": input " + std::to_string(index) + " is of a wrong type");
  return value;
}

size_t elements(const std::vector<int64_t>& shape) {
  size_t count = 1;
  for (const int64_t size : shape) count *= size_t(size);
  return count;
}

Packed packed_constant(const ort::KernelInfo* info, size_t index, const std::string& name) {
  const ort::Value* value = constant(info, index, ort::kUint8, name);
  return open(api.data<const uint8_t>(value), elements(api.shape(value)), name);
}

Lender threads_of(ort::KernelContext* context) {
  return {[](void* self, size_t count, void (*work)(void*, size_t), void* user) {
            api.parallel(static_cast<const ort::KernelContext*>(self), count, work, user);
          },
          context};
}

struct SparseLinear {
  static constexpr const char* kName = "SparseLinear";
  static size_t inputs() { return 3; }
  static int input_type(size_t i) { return i == 1 ? ort::kUint8 : ort::kFloat; }
  static int characteristic(size_t) { return ort::kRequired; }

  explicit SparseLinear(const ort::KernelInfo* info) : activation(activation_named(api.text(info, "activation"))) {
    const Packed packed = packed_constant(info, 1, "SparseLinear weight");
    const ort::Value* given = constant(info, 2, ort::kFloat, "SparseLinear bias");
    if (elements(api.shape(given)) != packed.rows) throw PackedError("SparseLinear bias: not one number for each row");
    const float* bias = api.data<const float>(given);
    weights = LinearWeights(packed, std::vector<float>(bias, bias + packed.rows), machine);
  }

  void compute(ort::KernelContext* context) const {
    const ort::Value* x = api.input(context, 0);
    std::vector<int64_t> shape = api.shape(x);
    if (shape.empty() || shape.back() != int64_t(weights.columns()))
      throw InputError("SparseLinear: the last axis of the input is not " + std::to_string(weights.columns()));
    const size_t rows = elements(shape) / weights.columns();
    shape.back() = weights.rows();
    ort::Value* y = api.output(context, 0, shape);
    linear(weights, activation, api.data<const float>(x), rows, api.data<float>(y), machine, threads_of(context));
  }

  Activation activation;
  const Machine machine = best_machine();
  LinearWeights weights;
};

// SparseProductTime(repeats int64, weight uint8 packed) -> float[1]: `product_seconds`, for the ledger of `spdtool bench`.
struct SparseProductTime {
  static constexpr const char* kName = "SparseProductTime";
  static size_t inputs() { return 2; }
  static int input_type(size_t i) { return i == 0 ? ort::kInt64 : ort::kUint8; }
  static int characteristic(size_t) { return ort::kRequired; }

  explicit SparseProductTime(const ort::KernelInfo* info) : tokens(api.integer(info, "tokens")) {
    const Packed packed = packed_constant(info, 1, "SparseProductTime weight");
    if (tokens < 1 || tokens > 1024) throw PackedError("SparseProductTime: tokens = " + std::to_string(tokens));
    if (packed.rows > 65536) throw PackedError("SparseProductTime: more than 65,536 rows");
    weights = LinearWeights(packed, std::vector<float>(packed.rows), machine);
  }

  void compute(ort::KernelContext* context) const {
    const ort::Value* given = api.input(context, 0);
    if (elements(api.shape(given)) != 1) throw InputError("SparseProductTime: repeats is one number");
    const int64_t repeats = *api.data<const int64_t>(given);
    if (repeats < 1) throw InputError("SparseProductTime: repeats = " + std::to_string(repeats));
    *api.data<float>(api.output(context, 0, {1})) =
        float(product_seconds(weights, size_t(tokens), size_t(repeats), machine));
  }

  int64_t tokens;
  const Machine machine = best_machine();
  LinearWeights weights;
};

struct SparseEncoder {
  static constexpr const char* kName = "SparseEncoder";
  static size_t inputs() { return 4; }
  static int input_type(size_t i) { return i < 3 ? ort::kInt64 : ort::kUint8; }
  static int characteristic(size_t i) { return i < 2 ? ort::kRequired : i == 2 ? ort::kOptional : ort::kVariadic; }

  explicit SparseEncoder(const ort::KernelInfo* info) {
    EncoderShape shape;
    const auto count = [&](const char* name) {
      const int64_t value = api.integer(info, name);
      if (value < 1 || value > 65536) throw PackedError(std::string(name) + " = " + std::to_string(value));
      return size_t(value);
    };
    shape.heads = count("heads");
    shape.layers = count("layers");
    shape.epsilon = api.number(info, "epsilon");
    shape.activation = activation_named(api.text(info, "activation"));
    shape.padding_id = api.integer(info, "padding_id");
    shape.token_types = api.integer(info, "token_types") != 0;
    shape.projection = api.integer(info, "projection") != 0;
    shape.reads = reads_named(api.text(info, "output"));
    shape.kind = kind_named(api.text(info, "kind", "bert"));  // files of BERT's kind may have no such attribute
    if (shape.kind == LayerKind::kModernBert) {
      shape.attention = api.text(info, "attention");
      const int64_t window = api.integer(info, "window");
      if (window < 0 || window > std::numeric_limits<int32_t>::max()) throw PackedError("window = " + std::to_string(window));
      shape.window = int32_t(window);
    }
    size_t index = 3;
    encoder = std::make_unique<Encoder>(shape, best_machine(), [&](const std::string& name) {
      return packed_constant(info, index++, name);
    });
    if (api.constant(info, index)) throw PackedError("SparseEncoder: more weights than its attributes ask for");
  }

  void compute(ort::KernelContext* context) const {
    const ort::Value *ids = api.input(context, 0), *mask = api.input(context, 1), *types = api.input(context, 2);
    const std::vector<int64_t> shape = api.shape(ids);
    if (shape.size() != 2) throw InputError("input_ids is not of the shape [batch, length]");
    if (api.shape(mask) != shape) throw InputError("attention_mask is not of the shape of input_ids");
    if (types && api.shape(types) != shape) throw InputError("token_type_ids is not of the shape of input_ids");
    std::vector<int64_t> result = {shape[0], shape[1], int64_t(encoder->hidden())};
    if (encoder->shape().pools()) result.erase(result.begin() + 1);
    if (encoder->shape().pools() && shape[0] > 0 && shape[1] == 0) throw InputError("rows without any token");
    const Tokens tokens{api.data<const int64_t>(ids), api.data<const int64_t>(mask),
                        types ? api.data<const int64_t>(types) : nullptr, size_t(shape[0]), size_t(shape[1])};
    encoder->run(tokens, api.data<float>(api.output(context, 0, result)), threads_of(context));
  }

  std::unique_ptr<Encoder> encoder;
};

template <class Operator>
ort::CustomOp describe() {
  using Op = ort::CustomOp;
  Op op{};
  op.version = ort::kApiVersion;
  op.name = [](const Op*) { return Operator::kName; };
  op.provider = [](const Op*) -> const char* { return nullptr; };  // the CPU
  op.input_count = [](const Op*) { return Operator::inputs(); };
  op.input_type = [](const Op*, size_t i) { return Operator::input_type(i); };
  op.input_characteristic = [](const Op*, size_t i) { return Operator::characteristic(i); };
  op.input_memory = [](const Op*, size_t) { return 0; };
  op.output_count = [](const Op*) { return size_t(1); };
  op.output_type = [](const Op*, size_t) { return int(ort::kFloat); };
  op.output_characteristic = [](const Op*, size_t) { return int(ort::kRequired); };
  op.variadic_input_least = op.variadic_input_alike = [](const Op*) { return 1; };
  op.variadic_output_least = op.variadic_output_alike = [](const Op*) { return 1; };
  op.start_version = [](const Op*) { return 1; };
  op.end_version = [](const Op*) { return 1; };
  op.create_kernel_v2 = [](const Op*, const void*, const ort::KernelInfo* info, void** kernel) {
    return guarded([&] { *kernel = new Operator(info); });
  };
  op.compute_v2 = [](void* kernel, ort::KernelContext* context) {
    return guarded([&] { static_cast<const Operator*>(kernel)->compute(context); });
  };
  op.destroy = [](void* kernel) { delete static_cast<Operator*>(kernel); };
  return op;
}

}  // namespace
}  // namespace sparse_cpu

// Called by onnxruntime for a library given to SessionOptions.register_custom_ops_library.
SPARSE_EXPORT sparse_cpu::ort::Status* RegisterCustomOps(sparse_cpu::ort::SessionOptions* options,
                                                         const sparse_cpu::ort::ApiBase* base) {
  using namespace sparse_cpu;
  static const ort::CustomOp linear = describe<SparseLinear>(), encoder = describe<SparseEncoder>(),
                             timing = describe<SparseProductTime>();
  static ort::Domain* domain = nullptr;  // lives as long as the library: sessions share it
  static std::mutex mutex;  // sessions may be opened in several threads at once, while others run
  const std::lock_guard<std::mutex> lock(mutex);
  if (!api) api = ort::Api(base->get_api(ort::kApiVersion));
  if (!api) return nullptr;  // an onnxruntime before 1.17, which has said so itself
  return guarded([&] {
    if (domain == nullptr) {
      ort::Domain* made = nullptr;
      api.call(ort::kCreateCustomOpDomain, "spdtool", &made);
      api.call(ort::kCustomOpDomainAdd, made, &linear);
      api.call(ort::kCustomOpDomainAdd, made, &encoder);
      api.call(ort::kCustomOpDomainAdd, made, &timing);
      domain = made;
    }
    api.call(ort::kAddCustomOpDomain, options, domain);
  });
}

SPARSE_EXPORT const char* spdtool_sparse_cpu_version() { return SPDTOOL_SPARSE_CPU_VERSION; }

SPARSE_EXPORT const char* spdtool_sparse_cpu_isa() { return sparse_cpu::best_kernels().name; }

SPARSE_EXPORT const char* spdtool_sparse_cpu_int8_isa() { return sparse_cpu::best_int8_kernels().name; }
