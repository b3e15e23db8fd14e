// The button that turns the theme: as the system has it, light, dark. Returns the function that turns it.

function setUpTheme() {
  const themes = ["system", "light", "dark"];
  let theme = "system";
  try {
    theme = localStorage.getItem("far-env-theme") ?? theme;
  } catch {
    // without storage the choice lasts as long as the page
  }
  const apply = () => {
    document.documentElement.dataset.theme = theme;
    byId("theme-button").textContent = `Theme: ${theme}`;
  };
  const turn = () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    apply();
    try {
      localStorage.setItem("far-env-theme", theme);
    } catch {
      // as above
    }
  };
  apply();
  byId("theme-button").onclick = turn;
  return turn;
}
