// A device that is named CUDA and computes on the host, for a build of torch without CUDA.
//
// Its tensors lie in host memory of their own and carry the dispatch key CUDA. An operator without a kernel of its own
// here is computed by the CPU's kernel on aliases of the same memory ("Fallback"). As on a GPU, a host tensor of one
// dimension or more among the device tensors of an operator is an error. Whatever makes the host wait for a GPU (a copy
// that is not asynchronous, a value or a size that is read back) is reported to a Python function ("Reports").
// docs/pretend_device.md says what this proves and what it cannot.
#include <ATen/EmptyTensor.h>
#include <ATen/InferSize.h>
#include <ATen/TensorUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <atomic>
#include <map>
#include <mutex>
#include <set>

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::Storage;
constexpr auto CUDA = c10::DeviceType::CUDA;

// ---- Reports --------------------------------------------------------------------------------------------------------

PyObject* listener = nullptr;  // (kind of wait, operator) -> None

void report(const char* kind, const std::string& name) {
  if (listener == nullptr) return;
  py::gil_scoped_acquire gil;
  py::reinterpret_borrow<py::object>(listener)(kind, name);
}

// ---- Memory ---------------------------------------------------------------------------------------------------------

DeviceIndex device_count = 1;
thread_local DeviceIndex current_device = 0;
std::atomic<int64_t> allocated{0}, peak{0};  // bytes of the device's storages

void count_bytes(int64_t change) {
  int64_t now = allocated += change, highest = peak;
  while (now > highest && !peak.compare_exchange_weak(highest, now)) {
  }
}

// What a device storage keeps: memory that was allocated for it, or the host storage that an operator made.
struct Block {
  c10::DataPtr data;
  int64_t size;
};

c10::DataPtr own(c10::DataPtr data, int64_t size, DeviceIndex index) {
  void* address = data.get();
  count_bytes(size);
  auto release = [](void* context) {
    auto* block = static_cast<Block*>(context);
    count_bytes(-block->size);
    delete block;
  };
  return {address, new Block{std::move(data), size}, release, Device(CUDA, index)};
}

struct DeviceMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    return own(c10::GetCPUAllocator()->allocate(size), size, current_device);
  }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
} device_memory;

// Host memory that counts as page-locked: only copies from and to it are asynchronous.
struct PinnedMemory final : c10::Allocator {
  std::mutex mutex;
  std::map<uintptr_t, size_t> blocks;  // first address -> bytes
  c10::DataPtr allocate(size_t size) override;
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
  bool contains(const void* address) {
    std::lock_guard<std::mutex> lock(mutex);
    auto at = reinterpret_cast<uintptr_t>(address);
    auto next = blocks.upper_bound(at);
    return next != blocks.begin() && at < std::prev(next)->first + std::prev(next)->second;
  }
} pinned_memory;

c10::DataPtr PinnedMemory::allocate(size_t size) {
  auto* block = new c10::DataPtr(c10::GetCPUAllocator()->allocate(size));
  auto release = [](void* context) {
    auto* data = static_cast<c10::DataPtr*>(context);
    std::lock_guard<std::mutex> lock(pinned_memory.mutex);
    pinned_memory.blocks.erase(reinterpret_cast<uintptr_t>(data->get()));
    delete data;
  };
  std::lock_guard<std::mutex> lock(mutex);
  blocks[reinterpret_cast<uintptr_t>(block->get())] = size;
  return {block->get(), block, release, Device(c10::DeviceType::CPU)};
}

// ---- Device, streams, hooks: everything happens at once, in program order -------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return CUDA; }
  Device getDevice() const override { return {CUDA, current_device}; }
  Device exchangeDevice(Device device) const override {
    Device old = getDevice();
    setDevice(device);
    return old;
  }
  void setDevice(Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.has_index()) current_device = device.index();
  }
  DeviceIndex deviceCount() const noexcept override { return device_count; }
  c10::Stream getStream(Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, Device(CUDA, device.has_index() ? device.index() : current_device));
  }
  c10::Stream getDefaultStream(Device device) const override { return getStream(device); }
  c10::Stream getStreamFromGlobalPool(Device device, bool) const override { return getStream(device); }
  c10::Stream getNewStream(Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { report("synchronize", "stream"); }
  void record(void** event, const c10::Stream&, DeviceIndex, c10::EventFlag) const override { *event = &device_count; }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override { report("synchronize", "event"); }
  void destroyEvent(void*, DeviceIndex) const noexcept override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
} guard;
const c10::impl::DeviceGuardImplRegistrar registered_guard(CUDA, &guard);

// torch asks these hooks whether CUDA exists. It looks them up once, so this library is loaded before torch.
namespace at {
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return device_count; }
  int getNumGPUs() const override { return device_count; }
  DeviceIndex current_device() const override { return ::current_device; }
  DeviceIndex getCurrentDevice() const override { return ::current_device; }
  void setCurrentDevice(DeviceIndex index) const override { ::current_device = index; }
  DeviceIndex exchangeDevice(DeviceIndex index) const override { return std::exchange(::current_device, index); }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override { return exchangeDevice(index); }
  void deviceSynchronize(DeviceIndex) const override {}
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  bool isPinnedPtr(const void* address) const override { return pinned_memory.contains(address); }
};
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, CUDAHooks)
}  // namespace at

// ---- Tensors of the device as tensors of the host, and back ---------------------------------------------------------

bool on_device(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == CUDA; }

Tensor with_storage(Storage storage, c10::DispatchKey key, const Tensor& like) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return made;
}

// A storage at the same address; `data` keeps that memory.
Storage storage_at(c10::DataPtr data, const Storage& storage, c10::Allocator* allocator) {
  return {Storage::use_byte_size_t(), storage.nbytes(), std::move(data), allocator, /*resizable=*/true};
}

c10::DataPtr keep(const Storage& storage) {
  return {storage.mutable_data(), new Storage(storage), [](void* kept) { delete static_cast<Storage*>(kept); },
          Device(c10::DeviceType::CPU)};
}

Tensor to_host_alias(const Tensor& tensor) {
  return with_storage(storage_at(keep(tensor.storage()), tensor.storage(), c10::GetCPUAllocator()),
                      c10::DispatchKey::CPU, tensor);
}

Tensor to_device_alias(const Tensor& tensor) {
  auto data = own(keep(tensor.storage()), tensor.storage().nbytes(), current_device);
  return with_storage(storage_at(std::move(data), tensor.storage(), &device_memory), c10::DispatchKey::CUDA, tensor);
}

Tensor view_of(const Tensor& base, at::IntArrayRef sizes, at::IntArrayRef strides, int64_t offset,
               std::optional<caffe2::TypeMeta> dtype = std::nullopt) {
  auto view = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, Storage(base.storage()), base.key_set(),
                                                       dtype.value_or(base.dtype()));
  view.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset);
  return view;
}

// Gives a device storage other memory, with what the old one held.
void replace_memory(c10::StorageImpl* storage, const void* content, size_t content_bytes, size_t bytes) {
  auto fresh = device_memory.allocate(bytes);
  if (content_bytes) std::memcpy(fresh.get(), content, content_bytes);
  storage->set_data_ptr_noswap(std::move(fresh));
  storage->set_nbytes(bytes);
}

// ---- Fallback: one call of an operator, by the CPU's kernel ---------------------------------------------------------

// Operators whose result's size or value the host needs.
const std::set<std::string> READ_BACK = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount", "aten::repeat_interleave.Tensor"};
// Operators that take index tensors of the host, as CUDA's do, and copy them.
const std::set<std::string> INDEXING = {
    "aten::index.Tensor", "aten::_unsafe_index.Tensor", "aten::index_put", "aten::index_put_",
    "aten::_index_put_impl_", "aten::_unsafe_index_put"};

class Call {
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack* stack) : op_(op), stack_(stack), name_(op.schema().name()) {
    if (!op.schema().overload_name().empty() && op.schema().overload_name() != "default")
      full_name_ = name_ + "." + op.schema().overload_name();
    else
      full_name_ = name_;
  }

  void run() {
    arguments_to_host();
    TORCH_CHECK(!uses_device_ || strays_.empty(), "Expected all tensors to be on the same device, but ", full_name_,
                " got", strays_, " among tensors on cuda:", static_cast<int>(current_device));
    if (READ_BACK.count(name_) || READ_BACK.count(full_name_) || has_mask_index_) report("read back", name_);
    op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack_);
    if (!uses_device_) return;
    const size_t first = stack_->size() - op_.schema().returns().size();
    for (size_t i = first; i < stack_->size(); ++i)
      replace_tensors((*stack_)[i], [this](const Tensor& tensor) { return result(tensor); });
  }

 private:
  template <typename Function>
  static void replace_tensors(c10::IValue& value, Function replaced) {
    if (value.isTensor()) {
      value = replaced(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) list.push_back(replaced(tensor));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const auto& tensor : value.toOptionalTensorVector())
        list.push_back(tensor.has_value() ? std::optional<Tensor>(replaced(*tensor)) : tensor);
      value = list;
    }
  }

  void arguments_to_host() {
    const auto& arguments = op_.schema().arguments();
    const size_t first = stack_->size() - arguments.size();
    for (size_t i = 0; i < arguments.size(); ++i) {
      auto& value = (*stack_)[first + i];
      if (value.isDevice() && value.toDevice().type() == CUDA) {
        uses_device_ = true;
        value = Device(c10::DeviceType::CPU);
      } else if (arguments[i].name() == "pin_memory") {
        value = c10::IValue();
      } else {
        const bool is_index = value.isOptionalTensorList();
        replace_tensors(value, [&](const Tensor& tensor) { return argument(tensor, is_index); });
      }
    }
  }

  Tensor argument(const Tensor& tensor, bool is_index) {
    if (!tensor.defined()) return tensor;
    if (is_index && (tensor.scalar_type() == at::kBool || tensor.scalar_type() == at::kByte)) has_mask_index_ = true;
    if (on_device(tensor)) {
      uses_device_ = true;
      aliases_.emplace_back(tensor, to_host_alias(tensor));
      return aliases_.back().second;
    }
    if (is_index && (INDEXING.count(name_) || INDEXING.count(full_name_)))
      report("copy to device", name_);
    else if (tensor.dim() > 0)
      strays_ += c10::str(" ", tensor.sizes(), " on ", tensor.device());
    return tensor;
  }

  // The device tensor for what the kernel returned: an argument, a view of an argument, or a new tensor.
  Tensor result(const Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    for (auto& [device, host] : aliases_)
      if (host.unsafeGetTensorImpl() == tensor.unsafeGetTensorImpl()) {
        auto* storage = device.storage().unsafeGetStorageImpl();
        if (host.storage().data() != storage->data())  // the kernel has resized its output
          replace_memory(storage, host.storage().data(), host.storage().nbytes(), host.storage().nbytes());
        if (!device.sizes().equals(host.sizes()) || !device.strides().equals(host.strides()))
          device.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
        return device;
      }
    for (auto& [device, host] : aliases_)
      if (tensor.storage().nbytes() && tensor.storage().data() == host.storage().data())
        return view_of(device, tensor.sizes(), tensor.strides(), tensor.storage_offset(), tensor.dtype());
    return to_device_alias(tensor);
  }

  const c10::OperatorHandle& op_;
  torch::jit::Stack* stack_;
  std::string name_, full_name_;
  std::vector<std::pair<Tensor, Tensor>> aliases_;  // device tensor, its host alias
  std::string strays_;                              // host tensors with values
  bool uses_device_ = false, has_mask_index_ = false;
};

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) { Call(op, stack).run(); }

// ---- Kernels of the device's own: creation, views, storages, copies -------------------------------------------------

using Dtype = std::optional<at::ScalarType>;
using OptionalDevice = std::optional<Device>;

template <typename Function>
Tensor created_on(OptionalDevice device, Function create) {
  const DeviceIndex old = current_device;
  if (device && device->has_index()) current_device = device->index();
  Tensor made = create();
  current_device = old;
  return made;
}

Tensor empty(at::IntArrayRef sizes, Dtype dtype, std::optional<at::Layout>, OptionalDevice device, std::optional<bool>,
             std::optional<at::MemoryFormat> format) {
  return created_on(device, [&]() -> Tensor {
    return at::detail::empty_generic(sizes, &device_memory, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                     c10::dtype_or_default(dtype), format);
  });
}

Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, Dtype dtype, std::optional<at::Layout>,
                     OptionalDevice device, std::optional<bool>) {
  return created_on(device, [&]() -> Tensor {
    return at::detail::empty_strided_generic(sizes, strides, &device_memory,
                                             c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype));
  });
}

Tensor as_strided(const Tensor& self, at::IntArrayRef sizes, at::IntArrayRef strides, std::optional<int64_t> offset) {
  return view_of(self, sizes, strides, offset.value_or(self.storage_offset()));
}

Tensor view(const Tensor& self, at::IntArrayRef sizes) {
  auto known = at::infer_size_dv(sizes, self.numel());
  auto strides = at::detail::computeStride(self.sizes(), self.strides(), known);
  TORCH_CHECK(strides.has_value(), "view size is not compatible with the tensor's size and stride");
  return view_of(self, known, *strides, self.storage_offset());
}

Tensor reshape_alias(const Tensor& self, at::IntArrayRef sizes, at::IntArrayRef strides) {
  return view_of(self, sizes, strides, self.storage_offset());
}

const Tensor& resize(const Tensor& self, at::IntArrayRef sizes, std::optional<at::MemoryFormat>) {
  auto* tensor = self.unsafeGetTensorImpl();
  auto* storage = tensor->unsafe_storage().unsafeGetStorageImpl();
  const int64_t numel = c10::multiply_integers(sizes);
  const size_t bytes = (numel + tensor->storage_offset()) * tensor->itemsize();
  if (numel && bytes > storage->nbytes()) replace_memory(storage, storage->data(), storage->nbytes(), bytes);
  tensor->set_sizes_contiguous(sizes);
  return self;
}

Tensor& set_strided(Tensor& self, at::Storage storage, int64_t offset, at::IntArrayRef sizes,
                    at::IntArrayRef strides) {
  auto* tensor = self.unsafeGetTensorImpl();
  tensor->set_storage_keep_dtype(std::move(storage));
  if (strides.size() == sizes.size()) {
    tensor->set_sizes_and_strides(sizes, strides, offset);
  } else {
    tensor->set_storage_offset(offset);
    tensor->set_sizes_contiguous(sizes);
  }
  return self;
}

Tensor& set_storage(Tensor& self, at::Storage storage) {
  const auto numel = static_cast<int64_t>(storage.nbytes() / self.dtype().itemsize());
  return set_strided(self, std::move(storage), 0, {numel}, {1});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_strided(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

Tensor& set_empty(Tensor& self) {
  return set_strided(self, Storage(Storage::use_byte_size_t(), 0, device_memory.allocate(0), &device_memory, true), 0,
                     {0}, {1});
}

Tensor& copy(Tensor& self, const Tensor& source, bool non_blocking) {
  const bool to_device = on_device(self), from_device = on_device(source);
  if (to_device != from_device) {
    const Tensor& host = to_device ? source : self;
    const bool is_async = non_blocking && pinned_memory.contains(host.storage().data());
    report(to_device ? (is_async ? "async copy to device" : "copy to device")
                     : (is_async ? "async copy to host" : "copy to host"), c10::str(source.sizes()));
  }
  at::AutoDispatchBelowAutograd below;
  Tensor target = to_device ? to_host_alias(self) : self;
  target.copy_(from_device ? to_host_alias(source) : source);
  return self;
}

Tensor copy_from(const Tensor& self, const Tensor& target, bool non_blocking) {
  Tensor written = target;
  return copy(written, self, non_blocking);
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& target) {
  Tensor written = target;
  written.resize_(self.sizes());
  return copy(written, self, false);
}

void record_stream(Tensor&, at::Stream) {}

int64_t math_attention(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
                       std::optional<double>, bool) {
  return 0;  // at::SDPBackend::math
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &as_strided);
  m.impl("view", &view);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("resize_", &resize);
  m.impl("set_.source_Storage_storage_offset", &set_strided);
  m.impl("set_.source_Storage", &set_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("set_", &set_empty);
  m.impl("copy_", &copy);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("record_stream", &record_stream);
  m.impl("_fused_sdp_choice", &math_attention);
}

#include "collectives.inc"

// ---- Python ---------------------------------------------------------------------------------------------------------

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("install", [](int devices, py::object function) {
    device_count = static_cast<DeviceIndex>(devices);
    c10::SetAllocator(CUDA, &device_memory);
    listener = function.release().ptr();
  });
  m.def("get_device", [] { return static_cast<int>(current_device); });
  m.def("set_device", [](int index) { current_device = static_cast<DeviceIndex>(index); });
  m.def("allocated", [] { return allocated.load(); });
  m.def("peak", [] { return peak.load(); });
  m.def("reset_peak", [] { peak = allocated.load(); });
  m.def("to_host_alias", &to_host_alias);
  m.def("to_device_alias", &to_device_alias);
  define_nccl(m);
}
