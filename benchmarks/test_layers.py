"""Every convolution of five networks, forward and backward, beside PyTorch's.

Each side is timed in both layouts, all four in turns in one process, and each is judged by its
better layout. The last table says, for each network and direction, the geometric mean of PyTorch's
time over fastconv's, and the layers where PyTorch wins. `-k resnet50` or `-k fprop` picks some.
"""

import pytest

from fastconv.benchmarking.layers import DIRECTIONS, compare_layer, layer_ways, layers_of

BATCHES = {"lenet5": 64, "alexnet": 8, "vgg16": 2, "resnet50": 4, "googlenet": 4}
LAYERS = {
    name: layer
    for network, batch in BATCHES.items()
    for name, layer in layers_of([network], batch).items()
}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_layer(benchmark, layer_results, name, direction):
    layer = LAYERS[name]
    ways = layer_ways(layer, direction)
    comparison = compare_layer(layer, ways)
    layer_results.append((name, direction, layer, comparison))
    benchmark.group = f"{name} {direction}"
    benchmark.extra_info.update(
        batch=layer.N,
        torch_over_fastconv=comparison.speedup.of_medians,
        low=comparison.speedup.low,
        high=comparison.speedup.high,
        fastconv_us={k: 1e6 * t.median for k, t in comparison.ours.items()},
        torch_us={k: 1e6 * t.median for k, t in comparison.theirs.items()},
        gflops=layer.flops / comparison.ours[comparison.our_layout].median / 1e9,
    )
    # The row of pytest-benchmark's own table: fastconv's better layout, timed by itself.
    benchmark.pedantic(ways["ours", comparison.our_layout], rounds=3, warmup_rounds=1)
