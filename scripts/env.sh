# Sourced by the other scripts: goes to the root of the repository and sets what every process of ours needs.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Importing torch, transformers and vLLM without their compiled bytecode takes ten seconds longer each time.
export PYTHONDONTWRITEBYTECODE=
# Models of these sizes are slower on several threads than on one.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TOKENIZERS_PARALLELISM=false
export DO_NOT_TRACK=1 HF_HUB_DISABLE_TELEMETRY=1 VLLM_NO_USAGE_STATS=1
