#pragma once
// ---- NCCL's part: collectives of contiguous device tensors alone, over gloo on the same memory ----------------------

class Nccl final : public c10d::Backend {
 public:
  using Tensors = std::vector<Tensor>;
  using TensorLists = std::vector<Tensors>;
  using Work = c10::intrusive_ptr<c10d::Work>;

  explicit Nccl(c10::intrusive_ptr<c10d::Backend> gloo)
      : Backend(gloo->getRank(), gloo->getSize()), gloo_(std::move(gloo)) {}
  const std::string getBackendName() const override { return "nccl"; }
  void setSequenceNumberForGroup() override {}
  uint64_t getSequenceNumberForGroup() override { return 0; }

  Work barrier(const c10d::BarrierOptions& options) override { return gloo_->barrier(options); }
  Work broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    auto aliases = host(tensors);
    return gloo_->broadcast(aliases, options);
  }
  Work allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    auto aliases = host(tensors);
    return gloo_->allreduce(aliases, options);
  }
  Work allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) override {
    return one_by_one(tensors.size(), [&](size_t i) {
      Tensors one{tensors[i]};
      return allreduce(one, options);
    });
  }
  Work reduce(Tensors& tensors, const c10d::ReduceOptions& options) override {
    auto aliases = host(tensors);
    return gloo_->reduce(aliases, options);
  }
  Work allgather(TensorLists& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    auto out = host(outputs);
    auto in = host(inputs);
    return gloo_->allgather(out, in, options);
  }
  // NCCL allows the input to be a part of the output: gloo gets a copy.
  Work _allgather_base(Tensor& output, Tensor& input, const c10d::AllgatherOptions& options) override {
    Tensor out = host(output), in = host(input).clone();
    return gloo_->_allgather_base(out, in, options);
  }
  Work allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                       const c10d::AllgatherOptions& options) override {
    return one_by_one(outputs.size(), [&](size_t i) { return _allgather_base(outputs[i], inputs[i], options); });
  }
  Work _reduce_scatter_base(Tensor& output, Tensor& input, const c10d::ReduceScatterOptions& options) override {
    Tensor out = host(output), in = host(input).clone();
    return gloo_->_reduce_scatter_base(out, in, options);
  }
  // Of parts that may differ in size; gloo has it of equal ones alone.
  Work reduce_scatter(Tensors& outputs, TensorLists& inputs, const c10d::ReduceScatterOptions& options) override {
    TORCH_CHECK(outputs.size() == 1 && inputs.size() == 1, "one device for each rank");
    auto out = host(outputs), in = host(inputs[0]);
    return one_by_one(in.size(), [&](size_t i) {
      Tensors sum{in[i].clone()};
      c10d::AllreduceOptions all;
      all.reduceOp = options.reduceOp;
      auto work = gloo_->allreduce(sum, all);
      work->wait();
      if (static_cast<int>(i) == getRank()) out[0].copy_(sum[0]);
      return work;
    });
  }
  Work reduce_scatter_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                       const c10d::ReduceScatterOptions& options) override {
    return one_by_one(outputs.size(), [&](size_t i) { return _reduce_scatter_base(outputs[i], inputs[i], options); });
  }
  Work alltoall_base(Tensor& output, Tensor& input, std::vector<int64_t>& output_sizes,
                     std::vector<int64_t>& input_sizes, const c10d::AllToAllOptions& options) override {
    Tensor out = host(output), in = host(input);
    return gloo_->alltoall_base(out, in, output_sizes, input_sizes, options);
  }
  Work gather(TensorLists& outputs, Tensors& inputs, const c10d::GatherOptions& options) override {
    auto out = host(outputs);
    auto in = host(inputs);
    return gloo_->gather(out, in, options);
  }
  Work scatter(Tensors& outputs, TensorLists& inputs, const c10d::ScatterOptions& options) override {
    auto out = host(outputs);
    auto in = host(inputs);
    return gloo_->scatter(out, in, options);
  }
  Work send(Tensors& tensors, int rank, int tag) override {
    auto aliases = host(tensors);
    return gloo_->send(aliases, rank, tag);
  }
  Work recv(Tensors& tensors, int rank, int tag) override {
    auto aliases = host(tensors);
    return gloo_->recv(aliases, rank, tag);
  }

 private:
  static Tensor host(const Tensor& tensor) {
    TORCH_CHECK(on_device(tensor), "No backend type associated with device type cpu: NCCL got a tensor on ",
                tensor.device());
    TORCH_CHECK(tensor.is_contiguous(), "Tensors must be contiguous");
    return to_host_alias(tensor);
  }
  template <typename Item>
  static std::vector<Item> host(const std::vector<Item>& items) {
    std::vector<Item> aliases;
    for (const auto& item : items) aliases.push_back(host(item));
    return aliases;
  }
  template <typename Function>
  static Work one_by_one(size_t count, Function start) {
    Work last;
    for (size_t i = 0; i < count; ++i) {
      last = start(i);
      last->wait();
    }
    return last;
  }

  c10::intrusive_ptr<c10d::Backend> gloo_;
};

// The Python class that torch.distributed looks up; `gloo_group` of device.py makes the group below it.
void define_nccl(py::module_& m) {
  py::class_<Nccl, c10::intrusive_ptr<Nccl>, c10d::Backend>(m, "ProcessGroupNCCL")
      .def(py::init([](py::object store, int rank, int size, py::object options) {
        auto gloo = py::module_::import("tests.pretend_cuda.device").attr("gloo_group")(store, rank, size, options);
        return c10::make_intrusive<Nccl>(gloo.cast<c10::intrusive_ptr<c10d::Backend>>());
      }))
      .def("_set_default_timeout", [](Nccl&, py::object) {})
      .def("_shutdown", [](Nccl&) {});
}
