"""Floor 4: what calibration looks at. One page per measure: `observe(x, …) -> dict[str, Tensor]`, summed by the driver."""
