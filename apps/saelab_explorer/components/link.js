// Copies the address of the page. Where the browser forbids it, the address is shown for copying by hand.

export default function ({ parentElement }) {
  const button = parentElement.querySelector("button"), told = parentElement.querySelector("span");
  button.onclick = async () => {
    try {
      await navigator.clipboard.writeText(location.href);
      told.textContent = "Copied";
      setTimeout(() => { told.textContent = ""; }, 2500);
    } catch {
      told.textContent = location.href;
    }
  };
}
