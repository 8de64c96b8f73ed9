"""Nets: built for a shape of images and a number of classes."""
