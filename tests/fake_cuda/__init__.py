"""The CUDA path without a GPU, for tests and benches; the fake device is redi/trace/fake.py.

aot.py     Triton kernels compiled for a GPU that is not there
cases.py   what test_cuda_without_a_gpu.py and test_bench_gpu.py run
"""
