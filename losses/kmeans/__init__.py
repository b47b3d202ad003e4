"""k-means on the device: seeded, shared out among the processes, with PyTorch and numpy alone.

Lloyd's iterations (lloyd.py) start from k-means++ on a sample or from random rows (start.py); of
several restarts the best is kept. quality.py says what the clusters are worth.

**The same bits for any number of processes.** Every process holds all rows. The rows are cut into
chunks whose boundaries depend on n and k alone, so that each matrix product has the same shape
wherever it is computed, and each process takes its share of the chunks (rows.py). What is summed
over rows is first rounded to whole numbers below 2^53, which float64 adds exactly in any order:
over the chunks, over a GPU's atomics, over the processes. (Whole numbers in int64 are as exact;
float64's index_add_ was measured to be 6 times faster on a CPU.) Equal devices are assumed: a CPU
and a GPU, or two kinds of GPU, round a matrix product differently.

**Memory beyond x**, in bytes on each process, for x of (n, D) in float32:

    8 n                   a start's lot over all rows; later the clusters of the best restart
    20 n / processes      clusters of this and the best restart, squared distances
    4 m D + 100 m         a start's sample of m rows (see `sample_size`), its two nearest candidates
    32 k D                candidates; centroids and their sums
    8 x 2^21              a chunk's scores and rows on a CPU; 8 x 2^26 on a GPU

With 1,281,167 x 128 (656 MB) and k = 10,000 that is 0.16 GB on a CPU, of which a start and an
iteration were measured to need 0.13. No second copy of x is made.
"""

from .lloyd import kmeans as kmeans
from .lloyd import no_progress as no_progress
