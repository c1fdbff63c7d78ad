# What the four scripts share. Override from outside: MODEL=Qwen/Qwen3-8B RUN=runs/qwen bash recipes/dflash/1_layers.sh
# Options given to a script go to its command and win: bash recipes/dflash/3_train.sh --num-epochs 2

MODEL=${MODEL:-pocket}                # the target: the built-in model, a Hugging Face name, or a folder
RUN=${RUN:-runs/dflash}               # everything is written below here
DEVICES=${DEVICES:-1}                 # processes, one per device
CONVERSATIONS=${CONVERSATIONS:-}      # JSON Lines of conversations whose questions the target answers; default: the built-in corpus
HELD_OUT=${HELD_OUT:-}               # the same, held out: beside CONVERSATIONS this is needed too
UNDERSTUDY=${UNDERSTUDY:-understudy}

# understudy on every device: with one it is started by itself, with several by torchrun
everywhere() {
  if [ "$DEVICES" -gt 1 ]; then
    torchrun --nproc_per_node="$DEVICES" -m understudy "$@"
  else
    $UNDERSTUDY "$@"
  fi
}
