# make demo       the whole method on a toy problem, on a CPU, in a few minutes
# make test       lint and tests
# make test-slow  puts one fault after another into a copy of the core; a test must notice each
# make clean      forget the virtual environment and everything in out/
# Each makes .venv first. Another interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
# So small a model runs slower on many threads than on two.
export OMP_NUM_THREADS ?= 2
# Threads that wait by spinning make a busy machine many times slower.
export OMP_WAIT_POLICY ?= passive
export TOKENIZERS_PARALLELISM ?= true
# Demo and tests start many processes: without it, each would compile every module again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow lint clean

demo: .venv/core
	@rm -rf out/demo
	$(BIN)/python -m redi.toy out/demo
	$(BIN)/python -m redi.prepare out/demo/raw.parquet --out out/demo
	$(BIN)/python train_sft.py --config recipes/toy_sft.toml
	$(BIN)/python train_redi.py --config recipes/toy_redi.toml
	$(BIN)/python evaluate.py --config recipes/toy_eval.toml --model out/demo/student --out out/demo/eval/base
	$(BIN)/python evaluate.py --config recipes/toy_eval.toml --model out/demo/sft --out out/demo/eval/sft
	$(BIN)/python evaluate.py --config recipes/toy_eval.toml --model out/demo/redi --out out/demo/eval/redi
	@$(BIN)/python -m redi.runlog out/demo/sft >/dev/null
	@$(BIN)/python -m redi.runlog out/demo/redi >/dev/null
	@echo
	@$(BIN)/python -m redi.eval.report out/demo/eval/base out/demo/eval/sft out/demo/eval/redi \
		--out out/demo/report.json
	@echo "curves:      out/demo/sft/curves.png, out/demo/redi/curves.png"
	@echo "completions: out/demo/eval/{base,sft,redi}/completions/benchmark.jsonl"

# A process a core, each with whole files of tests: what a file's tests share is made once.
test: .venv/dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test-slow: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv out .pytest_cache .ruff_cache .hypothesis

# ---- environments: made anew when their requirements change

# Modules are compiled when they are first imported; compiling all of them takes half a minute.
PIP_FLAGS := --quiet --disable-pip-version-check --no-compile

.venv/core: requirements.txt constraints.txt
	@$(call new_venv)
	@echo "installing requirements.txt into .venv (a minute or two)"
	@$(BIN)/pip install $(PIP_FLAGS) -r requirements.txt -c constraints.txt
	@$(call install_redi)
	@touch $@

.venv/dev: requirements-dev.txt requirements.txt constraints.txt
	@$(call new_venv)
	@echo "installing requirements-dev.txt into .venv (a minute or two)"
	@$(BIN)/pip install $(PIP_FLAGS) -r requirements-dev.txt -c constraints.txt
	@$(call install_redi)
	@touch .venv/core $@

# The command redi, from this folder as it is.
install_redi = $(BIN)/pip install $(PIP_FLAGS) --no-deps --editable .

define new_venv
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: redi needs Python 3.11 or newer; try make PYTHON=python3.11" >&2; exit 1; }; \
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
endef
