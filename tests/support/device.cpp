// A stand-in for a GPU: memory of the host behind torch's PrivateUse1 device, with CUDA's rules on mixing devices.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/InferSize.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <set>

namespace {

const c10::Device DEVICE(c10::DeviceType::PrivateUse1, 0);

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    void* data = n ? std::malloc(n) : nullptr;
    return {data, data, &std::free, DEVICE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
};
Memory memory;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &memory);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return DEVICE.type(); }
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Device getDevice() const override { return DEVICE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::Stream exchangeStream(c10::Stream) const override { return getStream(DEVICE); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// Draws what a generator of the CPU draws, and says that it is of this device.
struct Draws final : at::CPUGeneratorImpl {
  Draws() { device_ = DEVICE; }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static at::Generator generator = at::make_generator<Draws>();
    return generator;
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Draws>(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t n) const override {
    auto data = memory.allocate(n);
    std::memcpy(data.get(), storage.data(), std::min(n, storage.nbytes()));
    storage.set_data_ptr_noswap(std::move(data));
    storage.set_nbytes(n);
  }
};

Hooks hooks;
const bool REGISTERED = [] {
  at::RegisterPrivateUse1HooksInterface(&hooks);
  return true;
}();

bool on_device(const at::Tensor& t) { return t.defined() && t.device().type() == DEVICE.type(); }

// The same memory as a tensor of the CPU.
at::Tensor host(const at::Tensor& t) {
  if (!on_device(t)) return t;
  return at::from_blob(t.data_ptr(), t.sizes(), t.strides(), t.options().device(at::kCPU).requires_grad(false));
}

at::Tensor empty(
    c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  auto kept = c10::dtype_or_default(dtype);
  return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), kept, format);
}

at::Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>) {
  auto kept = c10::dtype_or_default(dtype);
  return at::detail::empty_strided_generic(
      size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), kept);
}

at::Tensor seen_as(const at::Tensor& t, c10::IntArrayRef size, c10::IntArrayRef stride, int64_t offset) {
  auto view = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(t.storage()), t.key_set(), t.dtype());
  view.unsafeGetTensorImpl()->set_storage_offset(offset);
  view.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
  return view;
}

at::Tensor as_strided(
    const at::Tensor& t, c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<int64_t> offset) {
  return seen_as(t, size, stride, offset.value_or(t.storage_offset()));
}

at::Tensor reshape_alias(const at::Tensor& t, c10::IntArrayRef size, c10::IntArrayRef stride) {
  return seen_as(t, size, stride, t.storage_offset());
}

at::Tensor view(const at::Tensor& t, c10::IntArrayRef size) {
  auto seen = host(t).view(size);
  return seen_as(t, seen.sizes(), seen.strides(), t.storage_offset());
}

at::Tensor unfold(const at::Tensor& t, int64_t dim, int64_t size, int64_t step) {
  auto seen = host(t).unfold(dim, size, step);
  return seen_as(t, seen.sizes(), seen.strides(), t.storage_offset());
}

at::Tensor as_real(const at::Tensor& t) {
  auto seen = at::view_as_real(host(t));
  auto found = seen_as(t, seen.sizes(), seen.strides(), t.storage_offset() * 2);
  found.unsafeGetTensorImpl()->set_storage_and_dtype(t.storage(), seen.dtype());
  return found;
}

at::Tensor as_complex(const at::Tensor& t) {
  auto seen = at::view_as_complex(host(t));
  auto found = seen_as(t, seen.sizes(), seen.strides(), t.storage_offset() / 2);
  found.unsafeGetTensorImpl()->set_storage_and_dtype(t.storage(), seen.dtype());
  return found;
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  host(to).copy_(host(from));
  return to;
}

const at::Tensor& resize_(const at::Tensor& t, c10::IntArrayRef size, std::optional<at::MemoryFormat>) {
  auto held = t.unsafeGetTensorImpl();
  size_t needed = at::detail::computeStorageNbytesContiguous(size, t.itemsize(), t.storage_offset());
  if (needed > t.storage().nbytes()) hooks.resizePrivateUse1Bytes(t.storage(), needed);
  held->set_sizes_contiguous(size);
  return t;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (to.sizes() != from.sizes()) resize_(to, from.sizes(), std::nullopt);
  return copy_from(from, to, false);
}

at::Tensor& set_storage_offset(
    at::Tensor& t, at::Storage storage, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  TORCH_CHECK(storage.device() == t.device(), "Attempted to set the storage of a tensor on another device");
  auto held = t.unsafeGetTensorImpl();
  held->set_storage_keep_dtype(std::move(storage));
  held->set_storage_offset(offset);
  stride.data() ? held->set_sizes_and_strides(size, stride) : held->set_sizes_contiguous(size);
  return t;
}

at::Tensor& set_storage(at::Tensor& t, at::Storage storage) {
  int64_t n = storage.nbytes() / t.itemsize();
  return set_storage_offset(t, std::move(storage), 0, {n}, {1});
}

at::Tensor& set_tensor(at::Tensor& t, const at::Tensor& source) {
  return set_storage_offset(t, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

at::Tensor& set_nothing(at::Tensor& t) {
  return set_storage_offset(t, c10::Storage(c10::Storage::use_byte_size_t(), 0, &memory, true), 0, {0}, {1});
}

at::Tensor convolution(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, c10::IntArrayRef stride,
    c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed, c10::IntArrayRef output, int64_t groups) {
  auto own = bias.has_value() ? std::optional(host(*bias)) : std::nullopt;
  TORCH_CHECK(on_device(x) && on_device(weight), "Expected all tensors to be on the same device");
  return at::convolution(host(x), host(weight), own, stride, padding, dilation, transposed, output, groups).to(DEVICE);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, c10::IntArrayRef stride,
    c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed, c10::IntArrayRef output, int64_t groups,
    std::array<bool, 3> wanted) {
  int64_t bias = weight.size(transposed ? 1 : 0) * (transposed ? groups : 1);
  auto [a, b, c] = at::convolution_backward(
      host(grad), host(x), host(weight), at::IntArrayRef{bias}, stride, padding, dilation, transposed, output, groups,
      wanted);
  auto placed = [](const at::Tensor& t) { return t.defined() ? t.to(DEVICE) : t; };
  return {placed(a), placed(b), placed(c)};
}

at::Tensor histc(const at::Tensor& t, int64_t bins, const at::Scalar& low, const at::Scalar& high) {
  return at::histc(host(t).to(at::kDouble), bins, low, high).to(t.scalar_type()).to(DEVICE);  // CUDA counts integers too
}

at::Scalar local_scalar_dense(const at::Tensor& t) { return at::_local_scalar_dense(host(t)); }

// Operators that CUDA has no kernel for.
const std::set<std::string> ABSENT{"aten::histogram", "aten::_histogramdd_from_bin_cts", "aten::_histogramdd_bin_edges"};
// Products of matrices, which CUDA computes for floating-point numbers only.
const std::set<std::string> PRODUCTS{"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::addmv", "aten::dot"};
// Operators whose second argument, a list of indices, may be on the CPU.
const std::set<std::string> INDEXED{
    "aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_", "aten::_unsafe_index_put",
    "aten::_unsafe_index"};

void check_one(const std::string& name, const c10::Argument& argument, const at::Tensor& t) {
  if (!t.defined() || on_device(t)) return;
  bool is_written = argument.alias_info() && argument.alias_info()->isWrite();
  TORCH_CHECK(
      t.dim() == 0 && !is_written, "Expected all tensors to be on the same device, but found at least two devices, "
      "cuda:0 and ", t.device(), "! (argument ", argument.name(), " of ", name, ")");
}

void strict_fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& arguments = schema.arguments();
  const auto& name = schema.name();
  TORCH_CHECK_NOT_IMPLEMENTED(!ABSENT.count(name), "Could not run '", name, "' with arguments from the 'CUDA' backend");
  size_t first = stack->size() - arguments.size();
  for (size_t i = 0; i < arguments.size(); ++i) {
    auto& value = (*stack)[first + i];
    if (value.isTensor()) {
      check_one(name, arguments[i], value.toTensor());
      TORCH_CHECK(
          !PRODUCTS.count(name) || c10::isFloatingType(value.toTensor().scalar_type()) || value.toTensor().is_complex(),
          "\"addmm_cuda\" not implemented for '", value.toTensor().scalar_type(), "'");
    } else if (value.isTensorList()) {
      for (const at::Tensor& t : value.toTensorVector()) check_one(name, arguments[i], t);
    } else if (value.isOptionalTensorList()) {
      if (INDEXED.count(name) && on_device((*stack)[first].toTensor())) continue;
      for (const std::optional<at::Tensor>& t : value.toOptionalTensorVector())
        if (t.has_value()) check_one(name, arguments[i], *t);
    } else if (value.isGenerator()) {
      auto generator = value.toGenerator();
      TORCH_CHECK(
          generator.device().type() == DEVICE.type(), "Expected a 'cuda' device type for generator but found '",
          generator.device().type(), "'");
      auto plain = at::make_generator<at::CPUGeneratorImpl>();
      auto own = generator.get<at::CPUGeneratorImpl>();
      plain.set_state(at::Tensor(own->get_state()));
      value = plain;
      at::native::cpu_fallback(op, stack, true);
      own->set_state(*plain.unsafeGetGeneratorImpl()->get_state());
      return;
    }
  }
  at::native::cpu_fallback(op, stack, true);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&strict_fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", as_strided);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("view", view);
  m.impl("unfold", unfold);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage_storage_offset", set_storage_offset);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("set_", set_nothing);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
  m.impl("view_as_real", as_real);
  m.impl("view_as_complex", as_complex);
  m.impl("histc", histc);
  m.impl("_local_scalar_dense", local_scalar_dense);
}

}  // namespace
