// Runs before the page is drawn, so that a chosen appearance does not flash.
try {
  const theme = localStorage.getItem("gptjax.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // A browser that keeps nothing follows the device.
}
