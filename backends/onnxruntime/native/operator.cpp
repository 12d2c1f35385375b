// lwc::DynamicQuantMatMul as a custom operator of ONNX Runtime.

#include "operator.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "matmul.h"

namespace lwc {

namespace {

struct Kernel {
  const ort::Api* api;
  Options options;
};

struct Failure {
  ort::Status* status;
};

void check(ort::Status* status) {
  if (status) throw Failure{status};
}

[[noreturn]] void fail(const ort::Api* api, const std::string& what) {
  throw Failure{ort::create_status(api, ("DynamicQuantMatMul: " + what).c_str())};
}

int64_t integer(const ort::Api* api, const ort::KernelInfo* info, const char* name) {
  int64_t value = 0;
  check(ort::attribute(api, info, name, &value));
  return value;
}

Activation activation(const ort::Api* api, const ort::KernelInfo* info) {
  char text[32];
  size_t size = sizeof(text);
  check(ort::attribute(api, info, "activation", text, &size));
  const std::string name(text, size ? size - 1 : 0);
  if (name == "none") return Activation::kNone;
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "relu") return Activation::kRelu;
  fail(api, "activation '" + name + "' is not known");
}

Options options_of(const ort::Api* api, const ort::KernelInfo* info) {
  Options options{};
  options.inputs = integer(api, info, "K");
  options.columns = integer(api, info, "N");
  options.bits = integer(api, info, "bits");
  options.block_size = integer(api, info, "block_size");
  options.block_of_x = integer(api, info, "x_block") != 0;
  options.zero_points = integer(api, info, "zero_points") != 0;
  options.bias = integer(api, info, "bias") != 0;
  options.gated = integer(api, info, "gated") != 0;
  options.activation = activation(api, info);
  const int64_t bits = options.bits, size = options.block_size;
  if (bits != 2 && bits != 3 && bits != 4 && bits != 8) fail(api, "bits must be 2, 3, 4 or 8");
  if (options.inputs <= 0 || options.columns <= 0) fail(api, "K and N must be positive");
  if (size < 0 || size % kStep || size > kSpan)
    fail(api, "block_size must be 0 or a multiple of 32 up to " + std::to_string(kSpan));
  if (options.gated && options.columns % (2 * kTile))
    fail(api, "a gated product needs whole pairs of tiles of 16 columns");
  return options;
}

struct Tensor {
  void* data;
  size_t count;
  ort::ElementType type;
  std::vector<int64_t> shape;
};

Tensor tensor(const ort::Api* api, const ort::KernelContext* context, size_t index) {
  const ort::Value* value = nullptr;
  check(ort::input(api, context, index, &value));
  if (!value) fail(api, "input " + std::to_string(index) + " is missing");
  ort::ShapeInfo* info = nullptr;
  check(ort::shape_of(api, value, &info));
  struct Release {
    const ort::Api* api;
    ort::ShapeInfo* info;
    ~Release() { ort::release(api, info); }
  } release{api, info};
  Tensor result{};
  size_t rank = 0;
  check(ort::rank(api, info, &rank));
  result.shape.resize(rank);
  check(ort::dimensions(api, info, result.shape.data(), rank));
  check(ort::element_count(api, info, &result.count));
  check(ort::element_type(api, info, &result.type));
  check(ort::data(api, value, &result.data));
  return result;
}

void expect(const ort::Api* api, const Tensor& given, int64_t count, const char* what) {
  if (static_cast<int64_t>(given.count) != count)
    fail(api, std::string(what) + " have " + std::to_string(given.count) + " elements instead of " +
                  std::to_string(count));
}

struct Work {
  const Options& options;
  Weights weights;
  Rows rows;
  const float* x;
  float* y;
  int64_t count;       // rows
  int64_t chunk;       // rows of an item
  int64_t chunks;
  int64_t tiles;       // tiles of an item
  int64_t slices;
};

constexpr int64_t kRoundedRows = 16;

void round_item(void* data, size_t item) {
  const Work& work = *static_cast<const Work*>(data);
  const int64_t begin = static_cast<int64_t>(item) * kRoundedRows;
  const int64_t end = begin + kRoundedRows < work.count ? begin + kRoundedRows : work.count;
  kernels().round_rows(work.options, work.x, begin, end, work.rows);
}

void multiply_item(void* data, size_t item) {
  const Work& work = *static_cast<const Work*>(data);
  const int64_t slice = static_cast<int64_t>(item) / work.chunks;
  const int64_t begin = static_cast<int64_t>(item) % work.chunks * work.chunk;
  const int64_t end = begin + work.chunk < work.count ? begin + work.chunk : work.count;
  const int64_t all = work.options.tiles();
  const int64_t first = slice * work.tiles;
  const int64_t last = first + work.tiles < all ? first + work.tiles : all;
  const size_t room = end - begin > kFewRows ? scratch_bytes(work.options) : 0;
  const std::unique_ptr<uint8_t[]> scratch(room ? new uint8_t[room] : nullptr);
  kernels().multiply(work.options, work.weights, work.rows, begin, end, first, last, scratch.get(),
                     work.y);
}

// Tiles of an item: enough work to be worth a thread's turn, and an even number.
int64_t tiles_of_item(const Options& options, int64_t rows) {
  constexpr int64_t kBytes = 1 << 16;  // of packed codes that a thread reads in a few microseconds
  const int64_t cost = rows > kFewRows ? options.tile_bytes() * rows / 4 : options.tile_bytes();
  int64_t tiles = cost ? kBytes / cost : 1;
  if (rows > kFewRows && tiles > 8) tiles = 8;
  return tiles < 4 ? 4 : tiles / 4 * 4;
}

void compute(const Kernel& kernel, ort::KernelContext* context) {
  const ort::Api* const api = kernel.api;
  const Options& options = kernel.options;
  const int64_t tiles = options.tiles(), blocks = options.blocks();

  const Tensor x = tensor(api, context, 0);
  if (x.type != ort::kFloat) fail(api, "x is not float32");
  if (x.shape.empty() || x.shape.back() != options.inputs)
    fail(api, "the last axis of x is not K = " + std::to_string(options.inputs));
  const Tensor codes = tensor(api, context, 1);
  expect(api, codes, tiles * options.tile_bytes(), "codes");
  const Tensor scales = tensor(api, context, 2);
  expect(api, scales, tiles * blocks * kTile, "scales");
  if (scales.type != ort::kFloat && scales.type != ort::kFloat16)
    fail(api, "scales are neither float32 nor float16");
  Weights weights{};
  weights.codes = static_cast<const uint8_t*>(codes.data);
  weights.scales = scales.data;
  weights.half = scales.type == ort::kFloat16;
  size_t next = 3;
  if (options.zero_points) {
    const Tensor zeros = tensor(api, context, next++);
    expect(api, zeros, tiles * blocks * kTile, "zero_points");
    if (zeros.type != ort::kUint8) fail(api, "zero_points are not uint8");
    weights.zero_points = static_cast<const uint8_t*>(zeros.data);
  }
  if (options.bias) {
    const Tensor bias = tensor(api, context, next++);
    expect(api, bias, options.columns, "bias");
    if (bias.type != ort::kFloat) fail(api, "bias is not float32");
    weights.bias = static_cast<const float*>(bias.data);
  }

  std::vector<int64_t> shape = x.shape;
  shape.back() = options.width();
  ort::Value* result = nullptr;
  check(ort::output(api, context, 0, shape.data(), shape.size(), &result));
  void* y = nullptr;
  check(ort::data(api, result, &y));
  const int64_t count = static_cast<int64_t>(x.count) / options.inputs;
  if (count == 0) return;

  const int64_t spans = options.spans();
  const std::unique_ptr<int8_t[]> rounded(new int8_t[count * options.depth()]);
  const std::unique_ptr<float[]> steps(new float[count * spans]);
  const std::unique_ptr<int32_t[]> sums(new int32_t[count * spans]);
  Work work{options,
            weights,
            {rounded.get(), steps.get(), sums.get()},
            static_cast<const float*>(x.data),
            static_cast<float*>(y),
            count,
            0, 0, 0, 0};
  work.chunk = count > 128 ? 96 : count;
  work.chunks = (count + work.chunk - 1) / work.chunk;
  work.tiles = tiles_of_item(options, work.chunk);
  work.slices = (tiles + work.tiles - 1) / work.tiles;
  const auto each = [&](void (*body)(void*, size_t), int64_t items) {
    if (items == 1)
      body(&work, 0);
    else
      check(ort::parallel_for(api, context, body, static_cast<size_t>(items), &work));
  };
  each(round_item, (count + kRoundedRows - 1) / kRoundedRows);
  each(multiply_item, work.slices * work.chunks);
}

// What a callback may not throw through ONNX Runtime becomes a status.
template <typename Body>
ort::Status* guarded(const ort::Api* api, Body body) {
  try {
    body();
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const std::exception& error) {
    return ort::create_status(api, error.what());
  }
}

ort::Status* create(const ort::CustomOp*, const ort::Api* api, const ort::KernelInfo* info,
                    void** kernel) {
  return guarded(api, [&] { *kernel = new Kernel{api, options_of(api, info)}; });
}

ort::Status* run(void* kernel, ort::KernelContext* context) {
  const Kernel& self = *static_cast<const Kernel*>(kernel);
  return guarded(self.api, [&] { compute(self, context); });
}

// The kernels that run on this processor, the best first.
std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found;
#ifdef LWC_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool vnni = avx2 && __builtin_cpu_supports("avx512vnni") &&
                    __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512dq");
  if (vnni) found.push_back(&kAvx512Vnni);
  if (avx2) found.push_back(&kAvx2);
#endif
  found.push_back(&kPlain);
  return found;
}

const Kernels& chosen() {
  const auto found = available();
  const char* const wanted = std::getenv("LWC_ISA");
  if (!wanted || !*wanted) return *found.front();
  std::string names;
  for (const Kernels* const each : found) {
    if (std::strcmp(wanted, each->name) == 0) return *each;
    names += (names.empty() ? "" : ", ") + std::string(each->name);
  }
  throw std::invalid_argument("LWC_ISA=" + std::string(wanted) +
                              " names no kernels that run here: " + names);
}

ort::CustomOp describe() {
  ort::CustomOp op{};
  op.version = ort::kApiVersion;
  op.GetName = [](const ort::CustomOp*) { return "DynamicQuantMatMul"; };
  op.GetExecutionProviderType = [](const ort::CustomOp*) { return "CPUExecutionProvider"; };
  // x, codes, scales, then zero points and bias where the attributes say so: scales are float16 or
  // float32, and the place of a bias differs, so these types are checked when the operator runs.
  op.GetInputType = [](const ort::CustomOp*, size_t index) {
    return index == 0 ? ort::kFloat : index == 1 ? ort::kUint8 : ort::kAnyType;
  };
  op.GetInputTypeCount = [](const ort::CustomOp*) -> size_t { return 5; };
  op.GetOutputType = [](const ort::CustomOp*, size_t) { return ort::kFloat; };
  op.GetOutputTypeCount = [](const ort::CustomOp*) -> size_t { return 1; };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.GetInputCharacteristic = [](const ort::CustomOp*, size_t index) {
    return index < 3 ? ort::kRequired : ort::kOptional;
  };
  op.GetOutputCharacteristic = [](const ort::CustomOp*, size_t) { return ort::kRequired; };
  op.GetInputMemoryType = [](const ort::CustomOp*, size_t) { return 0; };
  op.GetVariadicInputMinArity = [](const ort::CustomOp*) { return 0; };
  op.GetVariadicInputHomogeneity = [](const ort::CustomOp*) { return 0; };
  op.GetVariadicOutputMinArity = [](const ort::CustomOp*) { return 0; };
  op.GetVariadicOutputHomogeneity = [](const ort::CustomOp*) { return 0; };
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = run;
  op.GetStartVersion = [](const ort::CustomOp*) { return 1; };
  op.GetEndVersion = [](const ort::CustomOp*) { return 1; };
  return op;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& once = chosen();
  return once;
}

ort::Status* register_operators(ort::SessionOptions* options, const ort::Api* api) {
  // ONNX Runtime keeps pointers to both as long as any session lives.
  if (ort::Status* status = guarded(api, [] { kernels(); })) return status;
  static const ort::CustomOp op = describe();
  static ort::CustomOpDomain* domain = nullptr;
  if (!domain) {
    if (ort::Status* status = ort::create_domain(api, "lwc", &domain)) return status;
    if (ort::Status* status = ort::add_op(api, domain, &op)) return status;
  }
  return ort::add_domain(api, options, domain);
}

}  // namespace lwc
