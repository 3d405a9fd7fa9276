"""Attribution by gradients of a customized model: methods that write scores, see `scorers`."""
