#pragma once
// ---- Fallback: one call of an operator, by the CPU's kernel ---------------------------------------------------------

// Operators whose result's size or value the host needs.
const std::set<std::string> READ_BACK = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount", "aten::repeat_interleave.Tensor"};
// Operators that take index tensors of the host, as CUDA's do, and copy them.
const std::set<std::string> INDEXING = {
    "aten::index", "aten::_unsafe_index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_",
    "aten::_unsafe_index_put"};

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
    if (READ_BACK.count(name_) || READ_BACK.count(full_name_) || (has_mask_index_ && !fills_mask_))
      report("read back", name_);
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
        // `tensor[mask] = number` has a host value, which CUDA's index_put_ fills in without asking how many.
        if (arguments[i].name() == "values" && value.isTensor() && value.toTensor().defined())
          fills_mask_ = !on_device(value.toTensor()) && value.toTensor().numel() == 1;
        if (arguments[i].name() == "accumulate" && value.isBool() && value.toBool()) fills_mask_ = false;
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
    if (is_index && (INDEXING.count(name_)))
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
  bool uses_device_ = false, has_mask_index_ = false, fills_mask_ = false;
};

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) { Call(op, stack).run(); }
