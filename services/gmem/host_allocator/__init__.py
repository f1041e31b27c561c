"""The huge-page side of mm: frames, pools, subpools, vmemmap; counts, never bytes."""
