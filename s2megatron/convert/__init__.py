"""Checkpoints: conversion to and from Hugging Face, and a look into them."""
