export AUTOPRUNE_STUDIES=/tmp/w/bitstud
D=/tmp/w/claims/studies/claims/cache/cifar10
for o in "--bits 8" "--bits 4" "--bits 4 --scale mse --rounding gptq" "--bits 3 --scale mse --rounding gptq --bias-correction" "--bits 3 --scale mse --rounding adaptive" "--bits 2 --scale mse --rounding gptq --bias-correction" "--bits 4 --activation-bits 32 --scale mse --rounding gptq" "--bits 16"; do
rm -rf /tmp/w/bo; echo "== $o"; OMP_NUM_THREADS=1 PYTHONPATH=. python -m autoprune compress --model cifar_resnet20 --data imagefolder:$D --weights /work/shared/data/cifar_resnet20.safetensors --ratio 0 $o --to /tmp/w/bo --quiet | egrep "accuracy |accuracy:|size_ratio|latency_ratio |int8_layers|^size_bytes"
done
