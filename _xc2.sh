D=/tmp/w/claims/studies/claims/cache/cifar10
for o in "--bits 3 --scale mse --rounding gptq --aware 0.7 --steps 400" "--bits 2 --scale mse --rounding gptq --aware 0.8 --steps 400"  "--bits 4 --scale mse --rounding gptq --aware 0.7 --steps 400"; do
rm -rf /tmp/w/bo; echo "== $o"; OMP_NUM_THREADS=1 PYTHONPATH=. python -m autoprune compress --model cifar_resnet20 --data imagefolder:$D --weights /work/shared/data/cifar_resnet20.safetensors --ratio 0 $o --to /tmp/w/bo --quiet | egrep "accuracy |accuracy:|size_ratio|latency_ratio |int8_layers|^size_bytes|Error|error|bug"
done
