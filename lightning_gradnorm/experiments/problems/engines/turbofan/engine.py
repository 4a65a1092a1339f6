"""Readings of a turbofan's 21 sensors in each operating condition, and how wear shifts them.

The numbers are fitted to C-MAPSS's files, in its units (°R, psia, rpm, pps/psi, lbm/s). They are not its engine model.
``python scripts/compare_turbofan.py FOLDER`` measures how close they are.
"""

from __future__ import annotations

import numpy as np

CONDITIONS = np.array(
    [
        [0.0, 0.00, 100.0],
        [10.0, 0.25, 100.0],
        [20.0, 0.70, 100.0],
        [25.0, 0.62, 60.0],
        [35.0, 0.84, 100.0],
        [42.0, 0.84, 100.0],
    ]
)
"""Altitude (1000 ft), Mach number and throttle angle (°) of the six operating conditions. A single condition is the first."""

SHARES = np.array([0.15, 0.15, 0.15, 0.15, 0.15, 0.25])
"""Share of the flights in each of the six."""

SETTING_NOISE = np.array([0.0025, 0.0003, 0.0])
"""Standard deviation of the settings within a condition."""

HEALTHY = np.array(
    [
        [518.67, 642.4, 1586.8, 1402.6, 14.62, 21.6074, 553.97, 2388.06, 9056.0, 1.30, 47.35, 521.92, 2388.05, 8137.0, 8.417,
         0.03, 392.2, 2388, 100.00, 38.93, 23.360],
        [489.05, 604.6, 1498.5, 1305.2, 10.52, 15.490, 394.74, 2318.89, 8777.0, 1.26, 45.30, 371.80, 2388.09, 8129.0, 8.638,
         0.03, 368.8, 2319, 100.00, 28.61, 17.166],
        [491.19, 607.3, 1482.1, 1247.8, 9.35, 13.655, 334.85, 2323.94, 8722.0, 1.08, 44.28, 315.18, 2388.07, 8061.0, 9.205,
         0.02, 364.5, 2324, 100.00, 24.53, 14.716],
        [462.54, 536.7, 1259.8, 1045.8, 7.05, 9.027, 175.59, 1915.32, 8009.0, 0.94, 36.65, 164.71, 2028.21, 7873.0, 10.882,
         0.02, 306.6, 1915, 84.93, 14.30, 8.583],
        [449.44, 555.5, 1363.5, 1126.4, 5.48, 8.000, 194.64, 2222.93, 8348.0, 1.02, 41.82, 183.19, 2388.02, 8067.0, 9.306,
         0.02, 333.4, 2223, 100.00, 14.87, 8.923],
        [445.00, 549.4, 1351.2, 1122.5, 3.91, 5.714, 138.75, 2211.89, 8320.0, 1.02, 41.98, 130.65, 2387.97, 8084.0, 9.352,
         0.02, 330.2, 2212, 100.00, 10.62, 6.370],
    ]
)  # fmt: skip
"""Sensor readings of a new engine, shape ``(conditions, sensors)``."""

RELATIVE = HEALTHY / HEALTHY[0]
"""Effect of wear in a condition relative to the first condition. Noise is the same in all."""

# By fault mode, high-pressure compressor and fan, in the first condition: arrays of shape (2, sensors).
NOISE = np.array(
    [
        [0, 0.30, 4.0, 4.02, 0, 0.0013, 0.405, 0.030, 4.16, 0.001, 0.101, 0.30, 0.030, 3.16, 0.0202, 0, 0.90, 0, 0, 0.101,
         0.060],
        [0, 0.30, 4.0, 4.10, 0, 0.0025, 0.498, 0.082, 4.23, 0.001, 0.105, 0.41, 0.082, 3.26, 0.0204, 0, 0.90, 0, 0, 0.102,
         0.060],
    ]
)  # fmt: skip
"""Standard deviation of the measurement noise."""

NEW = np.array(
    [
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, -0.36, -4.6, -7.5, 0, -0.0209, 0, -0.14, -5.6, 0, -0.232, 0, -0.14, -2.8, -0.030, 0, -1.24, 0, 0, 0.092, 0.055],
    ]
)  # fmt: skip
"""Difference of a new engine's readings from `HEALTHY`. If the fan will fail, everything else is in a better state."""

BUILT = np.array(
    [
        [0, 0.38, 3.9, 7.7, 0, 0.0009, -0.78, 0.086, -7.0, 0, 0.240, -0.68, 0.086, -8.6, 0.030, 0, 1.08, 0, 0, -0.140, -0.084],
        [0, 0.17, 3.3, 3.1, 0, 0.021, 3.03, 0.205, 12.6, 0, 0.120, 2.89, 0.205, 10.1, -0.028, 0, 0.89, 0, 0, 0.160, 0.095],
    ]
)  # fmt: skip
"""How far the readings of the worst new engines lie above, and those of the best below."""

WORN = np.array(
    [
        [0, 1.33, 15.7, 26.9, 0, 0.0031, -2.55, 0.168, 40.5, 0, 0.815, -2.18, 0.170, 28.5, 0.106, 0, 4.17, 0, 0, -0.502,
         -0.299],
        [0, 0.96, 16.2, 22.1, 0, -0.0271, 14.7, 0.485, 67.5, 0.017, 0.793, 14.05, 0.487, 54.5, -0.191, 0, 4.29, 0, 0, 0.691,
         0.420],
    ]
)  # fmt: skip
"""Difference of the readings from `HEALTHY` at failure, averaged over the engines."""

MIX = np.array(
    [
        [0, 0, 3.2, -1.2, 0, 0, 0.78, -0.20, 172.0, 0, -0.134, 0.78, -0.20, 155.0, 0, 0, 0.90, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, -0.126, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
)  # fmt: skip
"""Additional difference at failure, times `Lives.mix`. A worn compressor's core turns faster than a new one in some
engines, slower in others. This explains nearly all of the spread of sensors 9 and 14."""

AT_FAILURE = 0.045
"""Relative standard deviation of the wear at which engines fail."""

DECIMALS = (2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 4, 2, 0, 0, 2, 2, 4)
"""Decimals of each sensor in NASA's files."""
