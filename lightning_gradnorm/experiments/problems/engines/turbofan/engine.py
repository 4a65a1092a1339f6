"""What the 21 sensors of a turbofan show in each operating condition, and how wear moves them.

The numbers are of C-MAPSS's order, in its units (°R, psia, rpm, pps/psi, lbm/s); they are not its engine model.
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
"""Altitude (1000 ft), Mach number and throttle angle (°) of the six operating conditions; the first is that of one only."""

SETTING_NOISE = np.array([0.0025, 0.0003, 0.0])
"""Standard deviation of the settings within a condition."""

HEALTHY = np.array(
    [
        [518.67, 642.2, 1585.5, 1401.0, 14.62, 21.61, 554.10, 2388.05, 9050.0, 1.30, 47.27, 521.90, 2388.05, 8131.0, 8.415,
         0.03, 391.8, 2388, 100.00, 38.95, 23.370],
        [489.05, 604.3, 1500.5, 1305.0, 10.52, 15.49, 394.10, 2318.90, 8772.0, 1.26, 45.25, 371.60, 2388.05, 8122.0, 8.630,
         0.03, 368.9, 2319, 100.00, 28.60, 17.160],
        [491.19, 606.9, 1480.0, 1244.0, 9.35, 13.65, 334.40, 2323.90, 8717.0, 1.08, 44.05, 315.00, 2388.05, 8059.0, 9.200,
         0.02, 364.2, 2324, 100.00, 24.55, 14.730],
        [462.54, 536.5, 1258.0, 1044.0, 7.05, 9.03, 175.50, 1915.20, 8006.0, 0.94, 36.55, 164.60, 2028.20, 7870.0, 10.870,
         0.02, 305.5, 1915, 84.93, 14.30, 8.590],
        [449.44, 555.1, 1360.0, 1127.0, 5.48, 8.00, 194.60, 2222.90, 8343.0, 1.02, 41.85, 183.20, 2388.00, 8065.0, 9.310,
         0.02, 333.4, 2223, 100.00, 14.80, 8.890],
        [445.00, 549.3, 1351.0, 1122.0, 3.91, 5.71, 138.70, 2211.90, 8325.0, 1.02, 42.05, 130.70, 2388.00, 8083.0, 9.350,
         0.02, 330.6, 2212, 100.00, 10.62, 6.370],
    ]
)  # fmt: skip
"""What the sensors of a new engine show, shape ``(conditions, sensors)``."""

RELATIVE = HEALTHY / HEALTHY[0]
"""The size of what noise and wear do in a condition, as a share of what they do in the first."""

NOISE = np.array(
    [0, 0.36, 4.8, 4.6, 0, 0.001, 0.42, 0.030, 4.6, 0, 0.115, 0.36, 0.030, 3.9, 0.023, 0, 0.85, 0, 0, 0.088, 0.054]
)
"""Standard deviation of the measurement noise in the first condition, shape ``(sensors,)``."""

WORN = np.array(
    [
        [0, 1.75, 19.0, 34.0, 0, 0, -2.30, 0.22, 55.0, 0, 1.10, -2.60, 0.22, 38.0, 0.130, 0, 5.6, 0, 0, -0.58, -0.345],
        [0, 1.55, 17.0, 27.0, 0, 0, 2.60, 0.28, 60.0, 0, 0.80, 2.90, 0.28, 42.0, -0.110, 0, 5.0, 0, 0, 0.42, 0.255],
    ]
)  # fmt: skip
"""What a worn engine's sensors show more than a new one's, by fault mode (high-pressure compressor, fan), at failure."""

CORE_SPEEDS = (8, 13)
"""Columns of sensors 9 and 14: in these, the same wear does much in one engine, little or the opposite in another."""

BUILT, ANSWER, CORE_ANSWER = 0.1, 0.05, (0.6, 0.5)
"""How engines differ: standard deviation of a new one's sensors, as a share of their noise; of their answer to wear, as
a share of it; and mean and standard deviation of what core speeds are multiplied by. Small, or few engines could be told
apart by them, and a network would learn their lives by heart."""

DECIMALS = (2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 4, 2, 0, 0, 2, 2, 4)
"""Decimals that NASA's files give of each sensor."""
