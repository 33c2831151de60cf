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

#include "fallback.h"

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

#include "collectives.h"

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
