// A CUDA backend for torch's C++ side that says it is there and does nothing.
//
// Python can replace torch.cuda, but not what C++ asks: indexing looks for CUDA's hooks, autograd for
// its device guard. Loading this library after torch swaps in both. It needs torch's headers only.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstring>

namespace {

const c10::Device first_gpu(c10::DeviceType::CUDA, 0);
const c10::Stream only_stream(c10::Stream::DEFAULT, first_gpu);

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return first_gpu; }
  c10::Device getDevice() const override { return first_gpu; }
  c10::Stream getStream(c10::Device) const noexcept override { return only_stream; }
  c10::Stream getNewStream(c10::Device, int) const override { return only_stream; }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag)
      const override {
    *event = const_cast<Guard*>(this);  // any address but null: "recorded"
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  int getNumGPUs() const override { return 1; }
  bool isPinnedPtr(const void*) const override { return false; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::detail::createCPUGenerator();
  }
} hooks;

struct Swap {
  Swap() {
    // torch keeps a pointer to its own hooks object for good, so that object gets our methods.
    auto& theirs = const_cast<at::CUDAHooksInterface&>(at::detail::getCUDAHooks());
    std::memcpy(static_cast<void*>(&theirs), static_cast<void*>(&hooks), sizeof(void*));
    auto& guard = c10::impl::device_guard_impl_registry[static_cast<size_t>(first_gpu.type())];
    guard.store(new Guard);
  }
} swap;

}  // namespace
