"""Where a voxel is: grids, volumes, fields."""
