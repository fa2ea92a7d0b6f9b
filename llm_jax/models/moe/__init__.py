"""Mixture of experts: feed-forward parts of which each token runs a few.

routing   what a router gives: experts and weights of each token
routers   top-k of scores: softmax, sigmoid, Switch, GShard, ReLU; controls without scores
balanced  rows of tokens shared out evenly: expert choice, Sinkhorn, BASE
soft      every expert reads mixtures of all tokens of a row (encoders)
balance   losses and statistics of a routing; what is learned without gradients
dispatch  tokens to experts and back: dense, by capacity, sorted
exchange  the same where experts lie on several devices
layer     the module that replaces `mlp.Mlp`
"""
