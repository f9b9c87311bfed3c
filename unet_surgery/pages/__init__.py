"""Pages of results in HTML: tables, grids of pictures, and charts as SVG, without scripts."""
