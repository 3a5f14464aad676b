"""What is told of a request and of the service: ids, printable lines, times of stages, buckets of histograms."""
